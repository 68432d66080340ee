"""Curves as SVG in a page: no image file, no library, colours from the page's light or dark style."""

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 240, 52, 12, 8, 34  # of the drawing, in its own units
NUM_COLOURS = 6  # classes c0 ... c5 of the page's style

Curve = Sequence[tuple[float, float]]  # points (x, y)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` + 1 round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def span(values: Sequence[float]) -> tuple[float, float]:
    """The values' range; a single value gets some room."""
    low, high = min(values), max(values)
    margin = 0.04 * (high - low) or 0.5 * abs(high) or 0.5
    return low - margin, high + margin


def draw_chart(curves: dict[str, Curve], *, x_label: str, y_label: str) -> str:
    """One SVG element with a line per curve; points that are not finite are left out, and curves without points.

    The curve number k has the style class c<k>, modulo `NUM_COLOURS`, whether or not those before it have points.
    """
    finite = {name: [(x, y) for x, y in curve if math.isfinite(y)] for name, curve in curves.items()}
    points = [point for curve in finite.values() for point in curve]
    (x_low, x_high), (y_low, y_high) = (span([point[k] for point in points]) for k in (0, 1))

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x_low) / (x_high - x_low), (y - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)}">']
    for value in ticks(y_low, y_high):
        _, y = place(x_low, value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for value in ticks(x_low, x_high):
        x, _ = place(value, y_low)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{value:.4g}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>'
    )
    for number, (name, curve) in enumerate(finite.items()):
        if not curve:
            continue
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in curve))
        (x, y), colour = place(*curve[-1]), f"c{number % NUM_COLOURS}"
        parts.append(f'<g class="{colour}"><title>{escape(name)}</title><polyline points="{line}"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/></g>')
    return "\n".join([*parts, "</svg>"])
