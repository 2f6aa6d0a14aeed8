"""Line charts as SVG, for reports that open anywhere and need nothing installed. A leaf."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from math import ceil, floor, log10
from typing import NamedTuple

WIDTH, HEIGHT = 640, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 150, 36, 48
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555", "#a0a000")
"""Told apart by colour-blind people too (Okabe and Ito)."""


class Series(NamedTuple):
    """One line; points are joined in the order given."""

    name: str
    points: Sequence[tuple[float, float]]


def line_chart(
    title: str, x_label: str, y_label: str, series: Sequence[Series], *, log_x: bool = False, log_y: bool = False
) -> str:
    """An ``<svg>`` with a point and a line for each series, axes, and names at the right.

    A log axis leaves out what is not above zero; a linear one begins at zero.
    """
    kept = [
        Series(s.name, [(x, y) for x, y in s.points if (x > 0 or not log_x) and (y > 0 or not log_y)]) for s in series
    ]
    xs = [x for s in kept for x, _ in s.points] or [1.0]
    ys = [y for s in kept for _, y in s.points] or [1.0]
    x_ticks, y_ticks = ticks(min(xs), max(xs), log=log_x), ticks(min(ys), max(ys), log=log_y)
    to_x = _scale(x_ticks, _LEFT, WIDTH - _RIGHT, log=log_x)
    to_y = _scale(y_ticks, HEIGHT - _BOTTOM, _TOP, log=log_y)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" '
        f'font-family="sans-serif" font-size="12"><title>{escape(title)}</title>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(_LEFT, 20, title, "font-weight='bold'"),
        _text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 10, x_label, "text-anchor='middle'"),
        _text(0, 0, y_label, f"text-anchor='middle' transform='translate(14 {HEIGHT / 2}) rotate(-90)'"),
    ]
    for x in x_ticks:
        parts.append(_line(to_x(x), HEIGHT - _BOTTOM, to_x(x), _TOP, "#e4e4e4"))
        parts.append(_text(to_x(x), HEIGHT - _BOTTOM + 16, f"{x:g}", "text-anchor='middle'"))
    for y in y_ticks:
        parts.append(_line(_LEFT, to_y(y), WIDTH - _RIGHT, to_y(y), "#e4e4e4"))
        parts.append(_text(_LEFT - 6, to_y(y) + 4, f"{y:g}", "text-anchor='end'"))
    for i, one in enumerate(kept):
        colour = COLOURS[i % len(COLOURS)]
        where = [(to_x(x), to_y(y)) for x, y in one.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in where)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{colour}"/>' for x, y in where]
        y = _TOP + 14 + 18 * i
        parts.append(_line(WIDTH - _RIGHT + 12, y - 4, WIDTH - _RIGHT + 30, y - 4, colour))
        parts.append(_text(WIDTH - _RIGHT + 36, y, one.name))
    return "\n".join([*parts, "</svg>"])


def ticks(low: float, high: float, *, log: bool = False) -> list[float]:
    """Round numbers that enclose ``low`` … ``high``: 1, 2, 5 times powers of ten; on a linear axis from zero on."""
    if log:
        marks = [m * 10.0**e for e in range(floor(log10(low)) - 1, ceil(log10(high)) + 1) for m in (1, 2, 5)]
        first = max(i for i, mark in enumerate(marks) if mark <= low * (1 + 1e-9))
        last = min(i for i, mark in enumerate(marks) if mark >= high * (1 - 1e-9))
        return marks[first : max(last, first + 1) + 1]
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        return [0.0, 1.0]
    rough = (high - low) / 6
    power = 10.0 ** floor(log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    return [round(i * step, 12) for i in range(floor(low / step), ceil(high / step) + 1)]


def _scale(marks: Sequence[float], begin: float, end: float, *, log: bool) -> Callable[[float], float]:
    low, high = (log10(marks[0]), log10(marks[-1])) if log else (marks[0], marks[-1])
    return lambda value: begin + ((log10(value) if log else value) - low) / (high - low) * (end - begin)


def _text(x: float, y: float, text: str, more: str = "") -> str:
    at = "" if "transform" in more else f'x="{x:.1f}" y="{y:.1f}"'
    return f"<text {at} {more}>{escape(text)}</text>"


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'
