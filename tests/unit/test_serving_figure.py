"""The figure, table and summary of the serving benchmark, from a file as the benchmark writes it."""

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

from benchmarks.serving import table

ROOT = Path(__file__).parents[2]
BOUNDS = {"0": 1.0, "1/3": 1.2, "1/2": 1.35, "2/3": 1.6}


def part(engine: str, batch: int, repetition: int, gains: list[float]) -> dict[str, object]:
    """Return a part as the benchmark writes it, with 2 first tokens per second at the full rate."""
    shares = {
        share: {
            "first_token_s": 0.5 / gain,
            "first_tokens_per_s": 2 * gain,
            "requests_per_s": gain,
            "tokens_per_s": 9.0,
            "router_share": 0.01,
            "connectors_share": 0.09,
        }
        for share, gain in zip(BOUNDS, gains, strict=True)
    }
    return {"size": "8b", "engine": engine, "batch": batch, "repetition": repetition, "shares": shares}


def test_pages_and_figure_show_the_medians_beside_their_bounds(tmp_path):
    content = {
        "commit": "abc1234",
        "machine": "2 CPUs",
        "settings": {"tiles": 3},
        "sizes": {
            "8b": {"layers": [2, 3], "of": [24, 36], "bound": BOUNDS, "bound_all_layers": BOUNDS},
        },
        "parts": [
            part("builtin", 1, 0, [1, 1.1, 1.2, 1.5]),
            part("builtin", 1, 1, [1, 1.1, 1.2, 1.52]),
            part("builtin", 1, 2, [1, 1.1, 1.2, 9.0]),
            part("vllm", 1, 0, [1, 1.1, 1.2, 1.44]),
            part("vllm", 16, 0, [1, 1.1, 1.2, 1.4]),
        ],
    }
    content["table"] = rows = table(content)
    assert rows[3]["gain"] == 1.52 and rows[3]["gain_over_bound"] == 0.95
    # the other 90 % of the time take 12 times as long with 12 times the layers
    assert rows[0]["parts_share_all_layers"] == round(0.1 / (0.1 + 0.9 * 12), 4)
    data, image = tmp_path / "serving.json", tmp_path / "gain.png"
    data.write_text(json.dumps(content))
    pages = [tmp_path / "table.md", tmp_path / "README.md"]
    for page, source in zip(pages, ("docs/measurements/serving.md", "README.md"), strict=True):
        page.write_text((ROOT / source).read_text())
    command = [sys.executable, str(ROOT / "docs" / "make_serving.py"), "--data", str(data)]
    subprocess.run([*command, "--image", str(image), "--pages", *map(str, pages)], check=True)
    assert Image.open(image).width > 400
    assert "| 8b | builtin | 1 | 2/3 |" in pages[0].read_text() and "| 1.52 | 1.6 |" in pages[0].read_text()
    assert "| built-in, 1 at once | vLLM, 1 at once | vLLM, 16 at once | bound |" in pages[1].read_text()
    assert "| 8B widths | 1.52 | 1.44 | 1.40 | 1.60 |" in pages[1].read_text()
    assert "## What is tested where" in pages[1].read_text(), "the rest of the page stays"
