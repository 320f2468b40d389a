"""A bar chart on a logarithmic scale, as SVG that suits a light and a dark page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, LEFT, RIGHT, ROW, TOP = 760, 310, 70, 26, 44


@dataclass(frozen=True)
class Bar:
    label: str
    value: float
    ours: bool


STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600 }
.scale { fill: #59636e; font-size: 11px }
line { stroke: #d1d9e0 }
.bar { fill: #8c959f }
.ours { fill: #0969da }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc }
  .scale { fill: #9198a1 }
  line { stroke: #3d444d }
  .bar { fill: #656c76 }
  .ours { fill: #4493f8 }
}
"""


def bars(title: str, rows: Sequence[Bar]) -> str:
    """The least expensive on top. Each bar begins at half of the least, since a logarithm has no zero."""
    rows = sorted(rows, key=lambda row: row.value)
    low = math.log10(rows[0].value / 2)
    high = max(math.log10(rows[-1].value), low + 0.5)
    bottom = TOP + ROW * len(rows)

    def x(value: float) -> float:
        return LEFT + (math.log10(value) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    drawn = [f'<text class="title" x="8" y="20">{escape(title)}</text>']
    for power in range(math.ceil(low), math.floor(high) + 1):
        for step in (1, 2, 5):
            value = step * 10.0**power
            if low < math.log10(value) <= high:
                drawn.append(f'<line x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{TOP - 6}" y2="{bottom}"/>')
                label = (
                    f'<text class="scale" x="{x(value):.1f}" y="{bottom + 14}" text-anchor="middle">{value:g}</text>'
                )
                drawn.append(label)
    for number, row in enumerate(rows):
        y = TOP + ROW * number
        kind = "ours" if row.ours else "bar"
        drawn.append(f'<text x="{LEFT - 8}" y="{y + 16}" text-anchor="end">{escape(row.label)}</text>')
        drawn.append(
            f'<rect class="{kind}" x="{LEFT}" y="{y + 3}" width="{x(row.value) - LEFT:.1f}" height="{ROW - 8}"/>'
        )
        drawn.append(f'<text x="{x(row.value) + 6:.1f}" y="{y + 16}">{row.value:.3g}</text>')
    height = bottom + 24
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">'
    return "\n".join([head, f"<title>{escape(title)}</title><style>{STYLE}</style>", *drawn, "</svg>", ""])
