"""Every message that the troubleshooting page quotes is one that the source can print."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("vico", "data_prep", "cluster", "stages", "pipeline")
_OWN_WORDS = re.compile(r"\b[A-Z]{4,}\b|\b[ABN]\b|\.\.\.")
"""Capitals that stand for the reader's names, and dots for words left out."""
_SIGNALS = ("SIGTERM",)


def source_texts() -> str:
    """All string literals of the packages, the values in f-strings as one space."""
    found = []
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else " " for part in node.values]
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(found)


def quoted_messages() -> list[str]:
    """What stands in backticks in the first column of the page's tables."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| ")]
    return [quote for cell in rows for quote in re.findall(r"`([^`]+)`", cell) if quote != "vico plan"]


def fixed_parts(message: str) -> list[str]:
    for name in _SIGNALS:
        message = message.replace(name, "...")
    parts = [part.strip(" :;=") for part in re.split(_OWN_WORDS, message)]
    return [part for part in parts if part]


def test_every_quoted_message_is_in_the_source():
    texts, messages = source_texts(), quoted_messages()
    assert len(messages) > 40
    missing = [message for message in messages if not all(part in texts for part in fixed_parts(message))]
    assert missing == []
