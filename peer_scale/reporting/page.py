"""One HTML page with everything in it: opened from a disk, a mail or a build's artefacts, it needs no network."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import plotly
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs
from plotly.utils import PlotlyJSONEncoder

from peer_scale.reporting import naming
from peer_scale.reporting.arms import Arm
from peer_scale.reporting.figures import Figure
from peer_scale.reporting.tables import Table

_TEMPLATES = "peer_scale.reporting.templates"


@dataclass(frozen=True)
class Card:
    """A number that stands large at the top."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Page:
    """What the page shows, as text that is not yet escaped."""

    title: str
    sentence: str
    notes: tuple[str, ...]
    cards: tuple[Card, ...]
    arms: tuple[Arm, ...]
    tables: tuple[Table, ...]
    figures: tuple[Figure, ...]
    axis_tables: tuple[dict[str, Any], ...]
    configurations: tuple[tuple[str, str], ...]
    sources: tuple[Table, ...] = ()


def render(page: Page) -> str:
    """Write the page; everything that comes from files is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_text_of), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters["breakable"] = _breakable
    return environment.get_template("report.html").render(
        page=page,
        groups=_grouped(page.figures),
        has_curves=any(figure.kind == "curve" for figure in page.figures),
        style=Markup(_text_of("report.css")),
        script=Markup(_text_of("report.js")),
        plotly=Markup(get_plotlyjs()),
        plotly_version=plotly.__version__,
        data=_as_json(
            {
                "tables": list(page.axis_tables),
                "figures": [_drawn(figure) for figure in page.figures],
                "arms": [arm.label for arm in page.arms],
            }
        ),
    )


def _text_of(name: str) -> str:
    return resources.files(_TEMPLATES).joinpath(name).read_text(encoding="utf-8")


def _breakable(text: str) -> Markup:
    """Let a long name be broken behind its dots and underscores, and not within words."""
    return Markup(re.sub(r"([._/])(?=\w)", r"\1<wbr>", str(escape(text))))


def _grouped(figures: Sequence[Figure]) -> list[tuple[str, list[tuple[int, Figure]]]]:
    """Give the figures of each part of the page with their numbers; parts without any are left out."""
    numbered = list(enumerate(figures))
    groups = [(title, [each for each in numbered if each[1].group == key]) for key, title in naming.GROUPS.items()]
    return [(title, inside) for title, inside in groups if inside]


def _drawn(figure: Figure) -> dict[str, Any]:
    plot = figure.plot.to_plotly_json()
    layout = {key: value for key, value in plot["layout"].items() if key != "template"}
    return {"title": figure.title, "kind": figure.kind, "data": plot["data"], "layout": layout}


def _as_json(content: Any) -> Markup:
    """Write JSON that may stand in a script element: nothing in it can end that."""
    text = json.dumps(content, cls=PlotlyJSONEncoder, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)
