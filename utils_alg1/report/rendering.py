"""Renders the pages of templates/ (jinja2): each is one file, with its style and its script inside it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils_alg1.base.text import format_count, format_duration, format_number, without_controls

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, style: Sequence[str], script: Sequence[str], **values: Any) -> str:
    """Fill a template; it escapes every value and raises for a missing one.

    Args:
        style, script: the files that are joined to the style and the script of the page.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    def visible(value: Any) -> Any:
        return value if hasattr(value, "__html__") else without_controls(str(value))

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, finalize=visible
    )
    formats = {"count": format_count, "duration": format_duration, "number": format_number}
    environment.filters |= {"csp_hash": csp_hash, **formats}
    return environment.get_template(template).render(style=source(*style), script=source(*script), **values)


def source(*names: str) -> Any:
    """Return the text of files of templates/, joined, which is not escaped: it is code of ours."""
    from markupsafe import Markup

    return Markup("".join((TEMPLATES / name).read_text("utf-8") for name in names))


def csp_hash(text: str) -> str:
    """Return how a Content-Security-Policy names an inline script or style: by its SHA-256."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
