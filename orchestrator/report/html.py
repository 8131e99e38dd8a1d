"""A sweep as one HTML file with charts, marks and a table. It needs no network.

The file contains plotly.js, compressed; the browser unpacks it. A policy in the page forbids the
browser from fetching anything. Numbers are shown rounded, and the file has all their digits: in
``data-v`` of the table's cells and in the JSON of the charts.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import math
import uuid
from collections import Counter
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from btu import __version__
from btu.errors import UserError
from btu.panels import MARKED, Axis, Heat, Panel, Series
from btu.paths import check_file
from orchestrator.report.charts import charts, named_cells
from orchestrator.report.marks import GUARDS, marks, summary
from orchestrator.report.table import METRIC_COLUMNS, PLAIN, coordinates, metric_columns, readable
from orchestrator.results.source import Source, records_or_refuse

SUFFIXES = (".html", ".htm")
# A column with at most this many values has a menu; others are filtered by text.
MOST_CHOICES = 20
# The tags of a record that name what its result was computed with.
VERSIONS = ("code", "python", "torch", "transformers", "device", "precision", "data", "victim")
# Pixels: a panel of lines, a row of a heat map, a bar.
LINE_HEIGHT, HEAT_ROW, BAR_ROW = 280, 38, 30


def page(source: Source, reload: int = 0) -> str:
    """Return the page of a sweep's finished cells.

    reload: seconds after which a browser reads the file again; 0 for a page that stays as it is.

    Raises:
        UserError: no cell is finished.
    """
    records = records_or_refuse(source)
    drawn = charts(records, source.tokens)
    failed = Counter(record["reason"].splitlines()[0] for record in source.failures())
    table = named_cells(records)
    found = {str(record.get("key", "")): marks(record) for record in records}
    payload = {chart.name: [figure(panel) for panel in chart.panels] for chart in drawn}
    return str(
        _template().render(
            name=source.name,
            reload=reload,
            cells=len(records),
            seeds=table["seed"].nunique(),
            failed=failed.most_common(),
            finished=_when(records),
            versions=_versions(records),
            btu=__version__,
            charts=drawn,
            css=_asset("page.css"),
            script=_asset("page.js"),
            payload=_json(payload),
            plotly=_plotly(),
            swatch=_swatch,
            guards=summary(records),
            marked=[(key, several) for key, several in found.items() if several],
            guard_names=list(GUARDS),
            dagger=MARKED,
            **_table(table, list(coordinates(records).columns)),
        )
    )


def check_page(path: Path) -> None:
    """Raise a `UserError` unless a page can be written there."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"--html {path} must end in {' or '.join(SUFFIXES)}.")
    check_file(f"--html {path}", path)


def write_page(source: Source, path: Path, reload: int = 0) -> None:
    """Write `page` to a path that `check_page` accepts, completely or not at all.

    Raises:
        UserError: no cell is finished, or the page cannot be written to disk.
    """
    text = page(source, reload)
    aside = path.with_name(f".{uuid.uuid4().hex}.html")
    try:
        try:
            aside.write_text(text, encoding="utf-8")
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"--html {path} cannot be written ({error.strerror or error}); name another file."
        ) from error


# Figures of plotly ------------------------------------------------------------------------------


def figure(panel: Panel) -> dict[str, Any]:
    """Return a panel as plotly's data and layout. The page adds the colors of its theme."""
    x: dict[str, Any] = {"title": {"text": html.escape(panel.x.label, quote=False)}}
    y: dict[str, Any] = {"title": {"text": html.escape(panel.y.label, quote=False)}}
    for axis, made in ((panel.x, x), (panel.y, y)):
        made["type"] = axis.kind
        made["automargin"] = axis.kind == "category"  # costs a second layout
        if axis.percent:
            made["tickformat"] = ".1~%"
        if axis.span:
            log = axis.kind == "log"
            made["range"] = [math.log10(end) if log else end for end in axis.span]
        if axis.ticks:
            made |= {"tickvals": list(axis.ticks), "ticktext": [f"{v:,.6g}" for v in axis.ticks]}
    layout: dict[str, Any] = {"xaxis": x, "yaxis": y, "height": LINE_HEIGHT}
    if panel.heat is not None:
        y["autorange"] = "reversed"
        layout["height"] = 80 + HEAT_ROW * len(panel.heat.rows)
        return {"data": [_heat(panel.heat)], "layout": layout}
    if panel.kind == "bars":
        y["autorange"] = "reversed"
        layout |= {"barmode": "stack", "height": 90 + BAR_ROW * len(panel.series[0].y)}
        return {"data": [_bar(series) for series in panel.series], "layout": layout}
    data = []
    for series in panel.series:
        data += [*_band(series), _scatter(panel, series)]
    return {"data": data, "layout": layout}


def _scatter(panel: Panel, series: Series) -> dict[str, Any]:
    modes = [
        name
        for name, there in (
            ("lines", series.dash),
            ("markers", series.marker),
            ("text", series.text),
        )
        if there
    ]
    label = html.escape(series.label, quote=False)
    values = [_hover_value(axis, letter) for axis, letter in ((panel.y, "y"), (panel.x, "x"))]
    trace: dict[str, Any] = {
        "type": "scatter",
        "name": label,
        "legendgroup": label,
        "mode": "+".join(modes),
        "x": _array(series.x),
        "y": _array(series.y),
        "opacity": series.opacity,
        "hovertemplate": f"{label}<br>{'<br>'.join(values)}<extra></extra>",
    }
    if series.dash:
        width = 1.2 if series.thin else 2
        trace["line"] = {"color": series.color, "dash": series.dash, "width": width}
    if series.marker:
        trace["marker"] = {"color": series.color, "symbol": series.marker, "size": series.size}
    if any(series.tip):
        trace["customdata"] = [html.escape(tip, quote=False) for tip in series.tip]
        trace["hovertemplate"] = f"%{{customdata}}<br>{trace['hovertemplate']}"
    if series.text:
        trace["text"] = [html.escape(text, quote=False) for text in series.text]
        trace["textposition"] = "top right"
    return trace


def _hover_value(axis: Axis, letter: str) -> str:
    name = html.escape(axis.label, quote=False)
    return f"{name} %{{{letter}{':.2%' if axis.percent else ''}}}".strip()


def _band(series: Series) -> list[dict[str, Any]]:
    """Return the band from the lowest seed to the highest; nothing if they are equal.

    The page has no whiskers: all its series with a range have a line.
    """
    ends = [
        (x, low, high)
        for x, low, high in zip(series.x, series.low, series.high, strict=False)
        if low is not None and high is not None
    ]
    if all(low == high for _, low, high in ends):
        return []
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "name": html.escape(series.label, quote=False),
            "legendgroup": html.escape(series.label, quote=False),
            "x": [x for x, _, _ in ends] + [x for x, _, _ in reversed(ends)],
            "y": [high for _, _, high in ends] + [low for _, low, _ in reversed(ends)],
            "fill": "toself",
            "fillcolor": series.color,
            "opacity": 0.18,
            "line": {"width": 0},
            "hoverinfo": "skip",
        }
    ]


def _heat(heat: Heat) -> dict[str, Any]:
    return {
        "type": "heatmap",
        "x": heat.columns,
        "y": [html.escape(row, quote=False) for row in heat.rows],
        "z": heat.shares,
        "zmin": heat.span[0],
        "zmax": heat.span[1],
        "text": heat.texts(),
        "texttemplate": "%{text}",
        "colorscale": "Viridis",
        "showscale": False,
        "xgap": 2,
        "ygap": 2,
        "hovertemplate": "%{y}, rate %{x}: %{z:.2%}<extra></extra>",
    }


def _bar(series: Series) -> dict[str, Any]:
    label = html.escape(series.label, quote=False)
    return {
        "type": "bar",
        "orientation": "h",
        "name": label,
        "legendgroup": label,
        "x": series.x,
        "y": [html.escape(name, quote=False) for name in series.y],
        "marker": {
            "color": series.color,
            "pattern": {
                "shape": series.hatch,
                "fillmode": "overlay",
                "fgcolor": "#ffffff",
                "size": 6,
            },
        },
        "hovertemplate": f"%{{y}}<br>{label}: %{{x:.4g}} s<extra></extra>",
    }


def _array(values: list[Any]) -> Any:
    """Return a long array of floats in plotly's binary form: exact, in a third of the space."""
    if len(values) < 50 or None in values:
        return values
    packed = np.asarray(values, dtype="<f8")
    return {"dtype": "f8", "bdata": base64.b64encode(packed.tobytes()).decode()}


def _json(value: Any) -> str:
    """Return JSON that is safe inside a script element."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


# The page ---------------------------------------------------------------------------------------


def _table(table: pd.DataFrame, names: list[str]) -> dict[str, Any]:
    """Return the columns and rows of the table of all cells, and the menus of its filter.

    table: from `named_cells`.
    names: the columns of coordinates.
    """
    table = table.assign(**{m: float("nan") for m in METRIC_COLUMNS if m not in table})
    metrics = metric_columns(table)
    shown = readable(table[[*names, *metrics, "marks"]])
    # Columns that are empty for every cell are left out, such as `alpha`, which one rule uses.
    names = [name for name in names if (shown[name] != "-").any()]
    shown = shown.drop(columns=[c for c in shown if c in table and c not in
                                (*names, *metrics, "marks")])  # fmt: skip
    runs = bool((table["run_id"] != "").any())
    columns = [{"name": name, "header": header, "numeric": name in metrics,
                "scale": 100 if name in metrics and name not in PLAIN else 1}
               for name, header in zip([*names, *metrics, "marks"], shown.columns,
                                       strict=True)]  # fmt: skip
    columns += [{"name": n, "header": n, "numeric": False, "scale": 1}
                for n in ("key", *(["run_id"] if runs else []))]  # fmt: skip
    shown["key"], shown["run_id"] = table["key"], table["run_id"]
    order = [column["name"] for column in columns]
    headers = [column["header"] for column in columns]
    rows = [
        {"key": key, "cells": list(zip(map(_exact, raw), text, strict=True))}
        for key, raw, text in zip(
            table["key"],
            table[order].itertuples(index=False),
            shown[headers].itertuples(index=False),
            strict=True,
        )
    ]
    choices = []
    for name in names:
        texts = list(dict.fromkeys(shown[name]))
        if 1 < len(texts) <= MOST_CHOICES:
            choices.append({"name": name, "column": order.index(name), "values": texts})
    return {"columns": columns, "rows": rows, "choices": choices}


def _exact(value: Any) -> str:
    """Return a value with all its digits; empty if there is none."""
    if value is None or value != value:
        return ""
    return repr(float(value)) if isinstance(value, float | np.floating) else str(value)


def _when(records: list[dict[str, Any]]) -> str:
    from datetime import UTC, datetime

    ends = [float(record["ended"]) for record in records if record.get("ended")]
    return datetime.fromtimestamp(max(ends), UTC).strftime("%Y-%m-%d %H:%M UTC") if ends else ""


def _versions(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return every value of the tags that name what the results were computed with."""
    found = []
    for name in VERSIONS:
        tags: list[Mapping[str, Any]] = [record.get("tags") or {} for record in records]
        values = {part for tag in tags for part in str(tag.get(name, "")).split(", ") if part}
        if values:
            found.append((name, ", ".join(sorted(values))))
    return found


def _swatch(series: Series) -> str:
    """Return the sample of a series for the legend, as SVG."""
    color = series.color
    dashes = {"solid": "", "dash": "6 3", "dot": "2 3", "dashdot": "7 3 2 3"}
    parts = []
    if series.dash:
        parts.append(
            f'<line x1="1" y1="7" x2="29" y2="7" stroke="{color}" stroke-width="2" '
            f'stroke-dasharray="{dashes[series.dash]}"/>'
        )
    if series.marker:
        parts.append(_symbol(series.marker, color))
    if not parts:
        parts.append(f'<rect x="6" y="1" width="18" height="12" fill="{color}"/>')
        strokes = {
            "/": '<path d="M8 13L16 1M15 13L23 1"/>',
            "\\": '<path d="M16 13L8 1M23 13L15 1"/>',
            "x": '<path d="M8 13L16 1M16 13L8 1M15 13L23 1M23 13L15 1"/>',
            "-": '<path d="M6 5H24M6 10H24"/>',
            ".": '<path d="M9 5h2M15 5h2M20 5h2M12 10h2M17 10h2"/>',
        }
        parts.append(f'<g stroke="#fff" stroke-width="1.5">{strokes.get(series.hatch, "")}</g>')
    inner = "".join(parts)
    return f'<svg width="30" height="14" viewBox="0 0 30 14" aria-hidden="true">{inner}</svg>'


def _symbol(marker: str, color: str) -> str:
    shapes = {
        "circle": '<circle cx="15" cy="7" r="4.5"/>',
        "square": '<rect x="11" y="3" width="8" height="8"/>',
        "diamond": '<path d="M15 1.5L20.5 7L15 12.5L9.5 7Z"/>',
        "triangle-up": '<path d="M15 2L20 12H10Z"/>',
        "triangle-down": '<path d="M15 12L20 2H10Z"/>',
        "cross": '<path d="M13 2h4v3h3v4h-3v3h-4v-3h-3v-4h3z"/>',
        "x": '<path d="M10.5 2.5L19.5 11.5M19.5 2.5L10.5 11.5" stroke-width="3"/>',
        "star": '<path d="M15 0.5l1.9 4.2 4.6.5-3.5 3 1 4.6-4-2.4-4 2.4 1-4.6-3.5-3 4.6-.5z"/>',
    }
    name = marker.removesuffix("-open")
    fill = "none" if name != marker else color
    return f'<g fill="{fill}" stroke="{color}" stroke-width="1.2">{shapes[name]}</g>'


def _asset(name: str) -> str:
    return (files("orchestrator.report") / "page" / name).read_text(encoding="utf-8")


@cache
def _plotly() -> str:
    """Return plotly.js, compressed and as text: a third of its size."""
    from plotly.offline import get_plotlyjs

    packed = gzip.compress(get_plotlyjs().encode(), 9, mtime=0)
    return base64.b64encode(packed).decode()


@cache
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    return environment.from_string(_asset("page.html"))
