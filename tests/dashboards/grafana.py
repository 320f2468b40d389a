"""The pieces of a Grafana dashboard, as its JSON model has them (Grafana 13, `schemaVersion` 42)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA_VERSION = 42
WIDTH = 24

Json = dict[str, Any]

DATASOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Query:
    """`legend` names series, `{{label}}` by their labels. `now` asks for one value, at the end of the time range."""

    expr: str
    legend: str = ""
    now: bool = False

    def target(self, number: int, format: Literal["time_series", "table", "heatmap"]) -> Json:
        return {
            "datasource": DATASOURCE,
            "editorMode": "code",
            "expr": self.expr,
            "format": format,
            "instant": self.now,
            "legendFormat": self.legend or "__auto",
            "range": not self.now,
            "refId": chr(ord("A") + number),
        }


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A panel without its place. `steps` are colours and the values from which they hold, the first from the least."""

    type: Literal["timeseries", "stat", "table", "heatmap"]
    title: str
    description: str
    queries: Sequence[Query]
    unit: str
    width: int
    options: Json
    custom: Json = field(default_factory=dict)
    steps: Sequence[tuple[str, float | None]] = (("green", None),)
    colour: Literal["palette-classic-by-name", "thresholds"] = "palette-classic-by-name"
    links: Sequence[Json] = ()
    mappings: Sequence[Json] = ()
    transformations: Sequence[Json] = ()
    overrides: Sequence[Json] = ()

    def at(self, id: int, x: int, y: int, height: int) -> Json:
        format: Literal["time_series", "table", "heatmap"] = "time_series"
        if self.type in ("table", "heatmap"):
            format = self.type
        steps = [{"color": color, "value": value} for color, value in self.steps]
        placed = {
            "id": id,
            "type": self.type,
            "title": self.title,
            "description": self.description,
            "datasource": DATASOURCE,
            "gridPos": {"h": height, "w": self.width, "x": x, "y": y},
            "targets": [query.target(number, format) for number, query in enumerate(self.queries)],
            "options": self.options,
            "fieldConfig": {
                "defaults": {
                    "unit": self.unit,
                    "color": {"mode": self.colour},
                    "thresholds": {"mode": "absolute", "steps": steps},
                    "links": list(self.links),
                    "mappings": list(self.mappings),
                    "custom": self.custom,
                },
                "overrides": list(self.overrides),
            },
        }
        if self.transformations:
            placed["transformations"] = list(self.transformations)
        return placed


@dataclass(frozen=True)
class Row:
    """Panels from left to right, `height` units of 30 pixels high."""

    title: str
    height: int
    panels: Sequence[Panel]


def lines(
    title: str,
    description: str,
    *queries: Query,
    unit: str,
    width: int = 12,
    stacked: bool = False,
    limit: float | None = None,
    links: Sequence[Json] = (),
) -> Panel:
    """Curves over time; `limit` is drawn as a dashed line."""
    return Panel(
        type="timeseries",
        title=title,
        description=description,
        queries=queries,
        unit=unit,
        width=width,
        options={
            "legend": {
                "calcs": ["mean", "max"],
                "displayMode": "table",
                "placement": "bottom",
                "showLegend": True,
                "sortBy": "Max",
                "sortDesc": True,
            },
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        custom={
            "drawStyle": "line",
            "fillOpacity": 25 if stacked else 0,
            "lineWidth": 1,
            "showPoints": "auto",
            "stacking": {"group": "A", "mode": "normal" if stacked else "none"},
            "axisSoftMin": 0,
            "thresholdsStyle": {"mode": "off" if limit is None else "dashed"},
        },
        steps=(("green", None),) if limit is None else (("transparent", None), ("red", limit)),
        links=links,
    )


def number(
    title: str,
    description: str,
    query: Query,
    *,
    unit: str,
    steps: Sequence[tuple[str, float | None]] = (),
    width: int = 4,
) -> Panel:
    """The last value, large, with its curve behind it where it has one."""
    return Panel(
        type="stat",
        title=title,
        description=description,
        queries=[query],
        unit=unit,
        width=width,
        options={
            "colorMode": "value",
            "graphMode": "none" if query.now else "area",
            "justifyMode": "auto",
            "orientation": "auto",
            "percentChangeColorMode": "standard",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "showPercentChange": False,
            "textMode": "auto",
            "wideLayout": True,
        },
        steps=steps or (("text", None),),
        colour="thresholds",
        # A part of no requests, or a quantile of none.
        mappings=[{"type": "special", "options": {"match": "nan", "result": {"index": 0, "text": "-"}}}],
    )


def buckets(title: str, description: str, query: Query, *, unit: str, width: int = 12) -> Panel:
    """How many fell into each bucket of a histogram, over time."""
    return Panel(
        type="heatmap",
        title=title,
        description=description,
        queries=[query],
        unit=unit,
        width=width,
        options={
            "calculate": False,
            "cellGap": 1,
            "color": {
                "exponent": 0.5,
                "fill": "dark-orange",
                "mode": "scheme",
                "reverse": False,
                "scale": "exponential",
                "scheme": "Oranges",
                "steps": 64,
            },
            "exemplars": {"color": "rgba(255,0,255,0.7)"},
            "filterValues": {"le": 1e-9},
            "legend": {"show": True},
            "rowsFrame": {"layout": "auto"},
            "showValue": "never",
            "tooltip": {"mode": "single", "showColorScale": False, "yHistogram": False},
            "yAxis": {"axisPlacement": "left", "unit": unit},
        },
        custom={"hideFrom": {"legend": False, "tooltip": False, "viz": False}},
    )


def listing(
    title: str, description: str, columns: Sequence[tuple[str, Query, str]], names: dict[str, str], *, width: int = 24
) -> Panel:
    """A line for each set of labels, a column for each query with its title and unit; sorted by the first.

    `names` are the titles of labels.
    """
    single = len(columns) == 1
    titles = {"Value" if single else f"Value #{chr(ord('A') + n)}": title for n, (title, _, _) in enumerate(columns)}
    return Panel(
        type="table",
        title=title,
        description=description,
        queries=[query for _, query, _ in columns],
        unit="short",
        width=width,
        options={
            "cellHeight": "sm",
            "frameIndex": 0,
            "showHeader": True,
            "sortBy": [{"desc": True, "displayName": columns[0][0]}],
        },
        custom={"align": "auto", "cellOptions": {"type": "auto"}, "inspect": False, "filterable": True},
        transformations=[
            {"id": "merge", "options": {}},
            {"id": "organize", "options": {"excludeByName": {"Time": True}, "renameByName": {**names, **titles}}},
        ],
        overrides=[
            {"matcher": {"id": "byName", "options": title}, "properties": [{"id": "unit", "value": unit}]}
            for title, _, unit in columns
        ],
    )


def choice(name: str, label: str, query: str, *, all_value: str | None = ".*") -> Json:
    """A variable with the values of a label. All of them, also of series that have none, are `all_value`."""
    variable: Json = {
        "type": "query",
        "name": name,
        "label": label,
        "datasource": DATASOURCE,
        "query": {"qryType": 1, "query": query, "refId": "PrometheusVariableQueryEditor-VariableQuery"},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }
    return variable if all_value is None else variable | {"allValue": all_value}


def dashboard(
    *, uid: str, title: str, description: str, variables: Sequence[Json], links: Sequence[Json], rows: Sequence[Row]
) -> Json:
    return {
        "uid": uid,
        "title": title,
        "description": description,
        "tags": ["replicate-proxy"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "1m",
        "time": {"from": "now-6h", "to": "now"},
        "timezone": "browser",
        "annotations": {
            "list": [
                {
                    "builtIn": 1,
                    "datasource": {"type": "grafana", "uid": "-- Grafana --"},
                    "enable": True,
                    "hide": True,
                    "iconColor": "rgba(0, 211, 255, 1)",
                    "name": "Annotations & Alerts",
                    "type": "dashboard",
                }
            ]
        },
        "links": list(links),
        "templating": {
            "list": [
                {"type": "datasource", "name": "datasource", "label": "Data source", "query": "prometheus"},
                *variables,
            ]
        },
        "panels": list(_placed(rows)),
    }


def link(title: str, uid: str) -> Json:
    """To another dashboard, with the same time range and variables."""
    return {
        "type": "link",
        "title": title,
        "tooltip": "",
        "url": f"/d/{uid}",
        "icon": "dashboard",
        "tags": [],
        "asDropdown": False,
        "targetBlank": False,
        "includeVars": True,
        "keepTime": True,
    }


def of_series(title: str, uid: str, variable: str, label: str) -> Json:
    """From a curve to another dashboard, with its label as a variable there."""
    where = "${datasource:queryparam}&${job:queryparam}&${__url_time_range}"
    return {"title": title, "url": f"/d/{uid}?{where}&var-{variable}=${{__field.labels.{label}}}"}


def _placed(rows: Sequence[Row]) -> Iterator[Json]:
    id, y = 1, 0
    for row in rows:
        yield {
            "id": id,
            "type": "row",
            "title": row.title,
            "collapsed": False,
            "gridPos": {"h": 1, "w": WIDTH, "x": 0, "y": y},
            "panels": [],
        }
        id, y, x = id + 1, y + 1, 0
        for panel in row.panels:
            if x + panel.width > WIDTH:
                x, y = 0, y + row.height
            yield panel.at(id, x, y, row.height)
            id, x = id + 1, x + panel.width
        y += row.height
