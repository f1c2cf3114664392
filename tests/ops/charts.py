"""The dashboard's panels with the drill's data as one HTML page of small charts: Grafana's look without a Grafana.

Knows SVG; where the series come from is given.
"""

from __future__ import annotations

import html
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from tests.ops.dashboards import Query

WIDTH, HEIGHT, MARGIN = 420, 150, 6
COLOURS = ("#7eb26d", "#eab839", "#6ed0e0", "#ef843c", "#e24d42", "#1f78c1", "#ba43a9", "#705da0", "#508642", "#cca300")
#: Lines named below a chart.
MAX_NAMED = 12
_STYLE = (
    "body{background:#111217;color:#ccc;font:12px sans-serif;display:flex;flex-wrap:wrap;gap:10px}"
    f"figure{{margin:0;background:#181b1f;padding:8px;width:{WIDTH}px}}figcaption b{{color:#fff}}"
    "svg{background:#0b0c0e}"
)

Series = Sequence[dict[str, Any]]


def page(queries: Sequence[Query], ask: Callable[[str], Series]) -> str:
    """One chart a panel; `ask` gives a query's series."""
    panels = [
        _panel([(query, ask(query.expr)) for query in of_panel])
        for _, of_panel in itertools.groupby(queries, key=lambda query: query.panel_id)
    ]
    return f"<!doctype html><meta charset=utf-8><style>{_STYLE}</style>{''.join(panels)}"


def _panel(found: Sequence[tuple[Query, Series]]) -> str:
    title = found[0][0].panel
    lines = [(_legend(query, one["metric"]), _points(one)) for query, series in found for one in series]
    values = [value for _, points in lines for _, value in points]
    head = f"<figcaption><b>{html.escape(title)}</b> [{html.escape(found[0][0].unit)}]"
    if not values:
        return f"<figure>{head} no data</figcaption></figure>"
    low, high = min(0.0, *values), max(values)
    moments = [moment for _, points in lines for moment, _ in points]
    frame = (min(moments), max(moments), low, high)
    drawn = "".join(
        f'<polyline fill=none stroke="{_colour(place)}" points="{_path(points, frame)}"/>'
        for place, (_, points) in enumerate(lines)
    )
    named = " ".join(
        f'<span style="color:{_colour(place)}">{html.escape(name)} {points[-1][1]:.4g}</span>'
        for place, (name, points) in enumerate(lines[:MAX_NAMED])
        if points
    )
    more = f" and {len(lines) - MAX_NAMED} more" if len(lines) > MAX_NAMED else ""
    chart = f"<svg width={WIDTH} height={HEIGHT}>{drawn}</svg>"
    return f"<figure>{head} {low:.4g} to {high:.4g}</figcaption>{chart}<div>{named}{more}</div></figure>"


def _legend(query: Query, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), query.legend).strip() or "value"


def _points(series: dict[str, Any]) -> list[tuple[float, float]]:
    """Those that can be drawn."""
    return [(moment, float(value)) for moment, value in series["values"] if math.isfinite(float(value))]


def _path(points: Sequence[tuple[float, float]], frame: tuple[float, float, float, float]) -> str:
    first, last, low, high = frame
    across = (WIDTH - 2 * MARGIN) / ((last - first) or 1)
    up = (HEIGHT - 2 * MARGIN) / ((high - low) or 1)
    return " ".join(
        f"{MARGIN + (moment - first) * across:.1f},{HEIGHT - MARGIN - (value - low) * up:.1f}"
        for moment, value in points
    )


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]
