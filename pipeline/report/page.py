"""The HTML page: templates, escaping, masking, and the policy that lets it load nothing.

Every text that a template inserts passes `_shown`: secrets are masked, characters that would change how other
text is read become escapes, and then Jinja escapes HTML. Only images and the style sheet, which this package
makes itself, are inserted as they are.
"""

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cluster.passwords import without_passwords
from vico.shown_text import printable_lines

GENERATOR = "vico report"
"""The page's `generator`; only a file with it is replaced by a later report."""
_TEMPLATES = Path(__file__).parent / "templates"


def rendered(report: object) -> str:
    """Return the page about a `Report`."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = (_TEMPLATES / "style.css").read_text(encoding="utf-8")
    return environment.get_template("page.html").render(
        report=report, style=Markup(style), policy=_policy(style), generator=GENERATOR
    )


def _policy(style: str) -> str:
    """Return a content security policy: nothing but images within the page, and this one style sheet."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


def _shown(value: Any) -> Any:
    if isinstance(value, Markup):
        return value
    return printable_lines(without_passwords(str(value)))
