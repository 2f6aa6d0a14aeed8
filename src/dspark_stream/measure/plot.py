"""Line charts, for reports that open anywhere and need nothing installed. A leaf."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from math import ceil, floor, log10
from typing import Literal, NamedTuple

WIDTH, HEIGHT = 640, 400
SUFFIXES = (".svg", ".png")
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 150, 36, 48
_FONT = 12
_RADIUS = 2.6
_GRID = "#e4e4e4"
_PIXELS = 2
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555", "#a0a000")
"""Told apart by colour-blind people too (Okabe and Ito)."""


class Series(NamedTuple):
    """One line; points are joined in the order given."""

    name: str
    points: Sequence[tuple[float, float]]


class _Line(NamedTuple):
    points: Sequence[tuple[float, float]]
    colour: str
    width: float = 1


class _Dot(NamedTuple):
    x: float
    y: float
    colour: str


class _Text(NamedTuple):
    x: float
    y: float
    text: str
    anchor: Literal["start", "middle", "end"] = "start"
    bold: bool = False
    upright: bool = True


@dataclass(frozen=True)
class Chart:
    """A line and points for each series, axes, and names at the right; as SVG, or as PNG.

    A log axis leaves out what is not above zero; a linear one begins at zero.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False

    def svg(self) -> str:
        """An ``<svg>``."""
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" '
            f'font-family="sans-serif" font-size="{_FONT}"><title>{escape(self.title)}</title>',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
            *map(_as_svg, self._marks()),
        ]
        return "\n".join([*parts, "</svg>"])

    def png(self) -> bytes:
        """The same in pixels, two for each of the SVG's units."""
        from PIL import Image, ImageDraw, ImageFont

        fine = 2 * _PIXELS  # drawn so large and then halved: lines have soft edges
        image = Image.new("RGB", (WIDTH * fine, HEIGHT * fine), "white")
        draw, font = ImageDraw.Draw(image), ImageFont.load_default(_FONT * fine)
        for mark in self._marks():
            match mark:
                case _Line(points, colour, width):
                    at = [(x * fine, y * fine) for x, y in points]
                    draw.line(at, colour, round(width * fine), "curve")
                case _Dot(x, y, colour):
                    draw.circle((x * fine, y * fine), _RADIUS * fine, colour)
                case _Text(x, y, text, anchor, bold, upright=True):
                    where = {"start": "ls", "middle": "ms", "end": "rs"}[anchor]
                    draw.text((x * fine, y * fine), text, "black", font, where, stroke_width=bold * fine // 4)
                case _Text(x, y, text):
                    width, height = (int(end) for end in draw.textbbox((0, 0), text, font)[2:])
                    label = Image.new("L", (width, height))
                    ImageDraw.Draw(label).text((0, 0), text, 255, font)
                    label = label.rotate(90, expand=True)
                    image.paste("black", (round(x * fine) - height, round(y * fine) - width // 2), label)
        file = BytesIO()
        image.resize((WIDTH * _PIXELS, HEIGHT * _PIXELS), Image.Resampling.LANCZOS).save(file, "PNG", optimize=True)
        return file.getvalue()

    def _marks(self) -> Iterator[_Line | _Dot | _Text]:
        """What is to be drawn, and where; later ones over earlier ones."""
        kept = [
            Series(s.name, [(x, y) for x, y in s.points if (x > 0 or not self.log_x) and (y > 0 or not self.log_y)])
            for s in self.series
        ]
        xs = [x for s in kept for x, _ in s.points] or [1.0]
        ys = [y for s in kept for _, y in s.points] or [1.0]
        x_ticks, y_ticks = ticks(min(xs), max(xs), log=self.log_x), ticks(min(ys), max(ys), log=self.log_y)
        right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
        to_x = _scale(x_ticks, _LEFT, right, log=self.log_x)
        to_y = _scale(y_ticks, bottom, _TOP, log=self.log_y)
        yield _Text(_LEFT, 20, self.title, bold=True)
        yield _Text((_LEFT + right) / 2, HEIGHT - 10, self.x_label, "middle")
        yield _Text(14, HEIGHT / 2, self.y_label, "middle", upright=False)
        for x in x_ticks:
            yield _Line([(to_x(x), bottom), (to_x(x), _TOP)], _GRID)
            yield _Text(to_x(x), bottom + 16, f"{x:g}", "middle")
        for y in y_ticks:
            yield _Line([(_LEFT, to_y(y)), (right, to_y(y))], _GRID)
            yield _Text(_LEFT - 6, to_y(y) + 4, f"{y:g}", "end")
        for i, one in enumerate(kept):
            colour = COLOURS[i % len(COLOURS)]
            where = [(to_x(x), to_y(y)) for x, y in one.points]
            yield _Line(where, colour, 1.8)
            for x, y in where:
                yield _Dot(x, y, colour)
            y = _TOP + 14 + 18 * i
            yield _Line([(right + 12, y - 4), (right + 30, y - 4)], colour)
            yield _Text(right + 36, y, one.name)


def line_chart(
    title: str, x_label: str, y_label: str, series: Sequence[Series], *, log_x: bool = False, log_y: bool = False
) -> str:
    """A `Chart` as SVG."""
    return Chart(title, x_label, y_label, series, log_x, log_y).svg()


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


def _as_svg(mark: _Line | _Dot | _Text) -> str:
    match mark:
        case _Line(points, colour, width):
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'
        case _Dot(x, y, colour):
            return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{_RADIUS}" fill="{colour}"/>'
        case _Text(x, y, text, anchor, bold, upright):
            at = f'x="{x:.1f}" y="{y:.1f}"' if upright else f'transform="translate({x:.1f} {y:.1f}) rotate(-90)"'
            weight = " font-weight='bold'" if bold else ""
            return f"<text {at} text-anchor='{anchor}'{weight}>{escape(text)}</text>"
