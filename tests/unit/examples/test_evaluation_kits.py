"""The comparison of two result folders, and the data of the demo task."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow.parquet as pq
import pytest

FOLDER = Path(__file__).parents[3] / "examples" / "evaluation_kits"


def script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def write_samples(folder: Path, task: str, scores: dict[int, float]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps(
            {
                "doc_id": key,
                "target": "a\u2028b",
                "filtered_resps": ["b"],
                "exact": score,
                "x": {"score": score},
            },
            ensure_ascii=False,
        )
        for key, score in scores.items()
    ]
    (folder / f"20260101_000000_samples_{task}.jsonl").write_text("\n".join(lines) + "\n")


def test_a_comparison_pairs_the_questions(tmp_path):
    compare = script(FOLDER / "compare.py")
    random = np.random.default_rng(3)
    first = {n: float(random.random() < 0.7) for n in range(400)}
    second = {n: score if n % 20 else 1 - score for n, score in first.items()}
    write_samples(tmp_path / "a" / "model", "demo", first)
    write_samples(tmp_path / "b", "demo", {**second, 999: 1.0})
    write_samples(tmp_path / "b", "other", {0: 1.0})
    text = compare.table(compare.scores_of(tmp_path / "a"), compare.scores_of(tmp_path / "b"))
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| demo")]
    assert [cells[:3] for cells in rows] == [["demo", "exact", "400"], ["demo", "x", "400"]]
    difference = np.mean([second[n] - first[n] for n in first])
    assert float(rows[0][5]) == pytest.approx(difference, abs=1e-4)
    low, high = map(float, rows[0][6].split(" to "))
    spread = 1.96 * np.std([second[n] - first[n] for n in first]) / 20
    assert (low, high) == (
        pytest.approx(difference - spread, abs=4e-3),
        pytest.approx(difference + spread, abs=4e-3),
    )
    assert "demo exact: 400 and 401 questions, 400 in both" in text and "other exact: 0 and 1" in text
    with pytest.raises(SystemExit, match="--log_samples"):
        compare.scores_of(tmp_path / "nothing")


def test_the_demo_task_has_its_data_and_its_scores(tmp_path):
    make_demo_task = script(FOLDER / "make_demo_task.py")
    make_demo_task.make_task(tmp_path / "task", 5, 1)
    data = pq.read_table(tmp_path / "task" / "vico_demo.parquet").to_pylist()
    assert len(data) == 5 and f"test: {tmp_path}" in (tmp_path / "task" / "vico_demo.yaml").read_text()
    utils = script(tmp_path / "task" / "utils.py")
    [picture] = utils.doc_to_visual(data[0])
    assert picture.mode == "RGB" and "<image>" not in utils.doc_to_text(data[0])
    doc = {"answer": "Forty two"}
    assert utils.process_results(doc, [" Forty  two "]) == {"exact": 1.0, "anls": 1.0}
    assert utils.process_results(doc, ["forty twa"]) == {"exact": 0.0, "anls": pytest.approx(8 / 9)}
    assert utils.process_results(doc, ["red"])["anls"] == 0.0
