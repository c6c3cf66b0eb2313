"""Renders templates to one page that holds all it needs, and lets nothing else in."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from siftclip.reading import read_text
from siftclip.redaction import shown

TEMPLATES = Path(__file__).with_name("templates")


def render(**values: Any) -> str:
    """Render `page.html.j2` with the page's own style and script inlined.

    Its Content-Security-Policy allows these two by their hashes, images that lie in the page, and
    nothing from anywhere. Texts are escaped, without credentials and what a terminal obeys.

    Args:
        values: what the templates show.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    style, script = (read_text(TEMPLATES / name) for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; "
        f"script-src '{_digest(script)}'; base-uri 'none'; form-action 'none'"
    )
    return environment.get_template("page.html.j2").render(
        policy=policy, style=Markup(style), script=Markup(script), **values
    )


def _finalize(value: Any) -> Any:
    """Hide credentials in texts; what is markup was made here."""
    return shown(value) if type(value) is str else value


def _digest(text: str) -> str:
    """Return the hash of an inlined text, as a Content-Security-Policy has it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
