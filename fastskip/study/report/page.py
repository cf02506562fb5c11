"""Render the page: one self-contained HTML file that loads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from fastskip import __version__
from fastskip.study.report.blocks import Section


def render(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The page as HTML; texts are escaped, charts are inserted as they are."""
    folder = files("fastskip.study.report")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((folder / "page.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        title=title,
        subtitle=subtitle,
        sections=[section for section in sections if section.blocks],
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),
        drawn=Markup,
        version=__version__,
    )
