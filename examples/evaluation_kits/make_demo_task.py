"""Write the task `vico_demo` for lmms-eval into a folder: questions of the demo, each about one picture.

python examples/evaluation_kits/make_demo_task.py OUT --questions 200
"""

import argparse
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.demo.records import demo_record

_TASK = Path(__file__).parent / "vico_demo"
_MARK = "<image>\n"
_DATA = "vico_demo.parquet"


def make_task(folder: Path, num_questions: int, seed: int) -> None:
    """Write data, yaml and functions; the yaml names the data by its absolute path."""
    rows: list[dict[str, str | bytes]] = []
    line = 0
    while len(rows) < num_questions:
        row, pictures = demo_record(seed, line)
        line += 1
        question, answer = (turn["value"] for turn in row["conversations"][:2])
        if len(pictures) == 1 and question.startswith(_MARK):
            rows.append({"question": question.removeprefix(_MARK), "answer": answer, "picture": pictures[0]})
    folder.mkdir(parents=True, exist_ok=True)
    data = folder.resolve() / _DATA
    pq.write_table(pa.Table.from_pylist(rows), data)
    shutil.copyfile(_TASK / "utils.py", folder / "utils.py")
    task = (_TASK / "vico_demo.yaml").read_text(encoding="utf-8").replace(f"test: {_DATA}", f"test: {data}")
    (folder / "vico_demo.yaml").write_text(task, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1, help="of the demo's records")
    arguments = parser.parse_args()
    make_task(arguments.out, arguments.questions, arguments.seed)


if __name__ == "__main__":
    main()
