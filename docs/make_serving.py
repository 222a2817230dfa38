"""The figure and the table of the serving benchmark, from its JSON.

    python -m benchmarks.serving docs/measurements/serving.json --vllm-python PYTHON
    python docs/make_serving.py

reads docs/measurements/serving.json, draws docs/images/serving_gain.png, and writes between the marks of two
pages: the table with its settings into docs/measurements/serving.md, the gains at 2/3 of the tiles and the
figure into README.md.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from stages.palette import BLACK, BLUE, GREY, ORANGE  # noqa: E402

DATA = ROOT / "docs" / "measurements" / "serving.json"
PAGE = ROOT / "docs" / "measurements" / "serving.md"
IMAGE = ROOT / "docs" / "images" / "serving_gain.png"
README = ROOT / "README.md"
BEGIN, END = "<!-- from serving.json by docs/make_serving.py -->", "<!-- end of serving.json -->"
_SHARE = "2/3"
"""Of the tiles compressed: half of the visual tokens."""
_NAMES = {"demo": "demo model", "1b": "1B widths", "8b": "8B widths"}
_ENGINES = {"builtin": ("built-in", BLUE), "vllm": ("vLLM", ORANGE)}
_COLUMNS = {
    "size": "size",
    "engine": "engine",
    "batch": "at once",
    "share": "compressed tiles",
    "first_token_s": "first token, s",
    "requests_per_s": "requests/s",
    "tokens_per_s": "tokens/s",
    "decoded_tokens_per_s": "tokens/s while all decode",
    "first_tokens_per_s": "first tokens/s",
    "gain": "gain",
    "bound": "bound",
    "router_share": "router",
    "connectors_share": "connectors",
    "parts_share_all_layers": "both, all layers",
}
_SHARES = ("router_share", "connectors_share", "parts_share_all_layers")


def figure(content: Mapping[str, Any]) -> Figure:
    """Plot first tokens per second over those at the full rate, one panel per size, with the bounds."""
    sizes = [size for size in _NAMES if any(row["size"] == size for row in content["table"])]
    drawn = Figure(figsize=(4.2 * len(sizes), 4), layout="constrained")
    for axes, size in zip(drawn.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        rows = [row for row in content["table"] if row["size"] == size]
        about = content["sizes"][size]
        names = list(about["bound"])
        layers = " and ".join(
            f"{kept} of {all_}" for kept, all_ in zip(about["layers"], about["of"], strict=True)
        )
        axes.plot(names, about["bound"].values(), color=BLACK, linestyle="--", label="bound by FLOPs")
        if about["layers"] != about["of"]:
            bounds = about["bound_all_layers"].values()
            axes.plot(names, bounds, color=GREY, linestyle=":", label="bound with all layers")
        for (engine, batch), gains in _curves(rows).items():
            label, colour = _ENGINES[engine]
            marker = "o" if batch == 1 else "s"
            text = f"{label}, {batch} at once"
            axes.plot(names[: len(gains)], gains, color=colour, marker=marker, linewidth=1, label=text)
        axes.set_title(f"{_NAMES[size]}\n{layers} layers of tower, language model", fontsize=9)
        axes.set_xlabel("share of tiles compressed")
        axes.set_ylim(bottom=min(0.9, *(row["gain"] for row in rows)) - 0.05)
        axes.legend(fontsize=7, frameon=False)
    drawn.axes[0].set_ylabel("first tokens per second, over the full rate")
    FigureCanvasAgg(drawn)
    return drawn


def _curves(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], list[float]]:
    curves: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        curves.setdefault((row["engine"], row["batch"]), []).append(row["gain"])
    return curves


def table(content: Mapping[str, Any]) -> str:
    """Return settings and table in Markdown."""
    settings = ", ".join(f"{key} {value}" for key, value in content["settings"].items() if value is not None)
    number = 1 + max(part["repetition"] for part in content["parts"])
    repetitions = "one repetition" if number == 1 else f"medians of up to {number} repetitions"
    lines = [f"Commit {content['commit']}, {content['machine']}; {settings}; {repetitions}.", ""]
    lines += [f"| {' | '.join(_COLUMNS.values())} |", "|" + "---|" * len(_COLUMNS)]
    for row in content["table"]:
        cells = [
            f"{row[key]:.1%}" if key in _SHARES and key in row else str(row.get(key, "")) for key in _COLUMNS
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(content: Mapping[str, Any]) -> str:
    """Return the gains at 2/3 of the tiles as a table beside their bounds, and the figure, in Markdown."""
    rows = [row for row in content["table"] if row["share"] == _SHARE]
    columns = sorted({(row["engine"], row["batch"]) for row in rows})
    gains = {(row["size"], row["engine"], row["batch"]): f"{row['gain']:.2f}" for row in rows}
    heads = [f"{_ENGINES[engine][0]}, {batch} at once" for engine, batch in columns]
    lines = [
        "The table shows first tokens per second with two thirds of the tiles compressed, which is half",
        "of the visual tokens, divided by the same at the full rate (1.44: 44 % more). The vision tower",
        "sees every tile in any case, so by FLOPs the gain is at most the last column. So few requests give",
        "noisy figures, and some are above it:",
        "",
        f"| | {' | '.join(heads)} | bound |",
        "|---|" + "---:|" * (len(heads) + 1),
    ]
    for size, name in _NAMES.items():
        if size in content["sizes"]:
            cells = [gains.get((size, *column), "") for column in columns]
            lines.append(f"| {name} | {' | '.join(cells)} | {content['sizes'][size]['bound'][_SHARE]:.2f} |")
    lines += [
        "",
        "1B and 8B widths have random weights and a part of the layers; settings, and how exact single",
        "figures are: [docs/measurements/serving.md](docs/measurements/serving.md).",
        "",
        "![First tokens per second against the share of compressed tiles](docs/images/serving_gain.png)",
    ]
    return "\n".join(lines)


def written_page(text: str, content: str) -> str:
    """Return a page with `content` between the marks; raise SystemExit if it has no marks."""
    if BEGIN not in text or END not in text:
        raise SystemExit(f"a page lacks the lines {BEGIN!r} and {END!r}; add them where the text belongs")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--image", type=Path, default=IMAGE)
    parser.add_argument("--pages", type=Path, nargs=2, default=(PAGE, README), metavar=("TABLE", "README"))
    arguments = parser.parse_args()
    content = json.loads(arguments.data.read_text(encoding="utf-8"))
    figure(content).savefig(arguments.image, format="png", dpi=120)
    for page, shown in zip(arguments.pages, (table(content), summary(content)), strict=True):
        page.write_text(written_page(page.read_text(encoding="utf-8"), shown), encoding="utf-8")


if __name__ == "__main__":
    main()
