"""Charts as small SVG pictures that take their colours from the page and keep their line widths at every size.

An SVG here has lines only; its scale is stretched to the width of the page. Words stand next to it in HTML, so that
they keep their size on a phone. A dot is a line of no length with round ends.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from qsvd.report.errors import number
from qsvd.report.page.markup import Markup, join, tag

WIDTH, HEIGHT = 1000, 400  # of the picture, in its own units
MOST_POINTS = 300  # of a line
MOST_TIPS = 80  # columns with a text of their own
MOST_ROWS = 24  # of the numbers below a chart
TICKS = 5


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Args:
        points: x and y, in the order of x.
        look: Of the line, a number from 0: its colour and its dashes; -1 is a faint line.
        has_dots: Whether points are marked.
        has_line: Whether points are joined.
        is_named: Whether the legend has it.
    """

    name: str
    points: Sequence[tuple[float, float]]
    look: int = 0
    has_dots: bool = False
    has_line: bool = True
    is_named: bool = True


@dataclass(frozen=True)
class Axis:
    """An axis: its name with the unit, and values that it shows in any case."""

    name: str
    includes: tuple[float, ...] = ()
    is_whole: bool = False


@dataclass(frozen=True)
class _Scale:
    """Ticks at equal distances from one end of the axis to the other."""

    ticks: tuple[float, ...]

    def place(self, value: float) -> float:
        """Return where a value stands, 0 at the first tick, 1 at the last one."""
        return (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])


def line_chart(title: str, x: Axis, y: Axis, series: Sequence[Series], kept_to: float | None = None) -> Markup:
    """Return a figure: title, legend, picture with axes, and its numbers as a table that can be opened.

    Args:
        series: Those without a point are left out.
        kept_to: The part of the x axis up to here is marked as kept.
    """
    found = [one for one in series if one.points]
    if not found:
        return tag("p", f"{title}: nothing was recorded.", class_="none")
    named = [one for one in found if one.is_named]
    horizontal = scale_of([px for one in found for px, _ in one.points], x)
    vertical = scale_of([py for one in found for _, py in one.points], y)
    picture = tag(
        "svg",
        _grid(vertical),
        _kept(kept_to, horizontal),
        (_drawn(one, horizontal, vertical) for one in found),
        _tips(found, x, horizontal),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"{title}. {'. '.join(_in_words(one, x) for one in found)}.",
    )
    return tag(
        "figure",
        tag("figcaption", tag("strong", title), tag("span", y.name, class_="unit")),
        _legend(named) if len(named) > 1 else None,
        tag(
            "div",
            tag("div", (_tick(value) for value in reversed(vertical.ticks)), class_="y", aria_hidden="true"),
            picture,
            tag("div", (_tick(value) for value in horizontal.ticks), class_="x", aria_hidden="true"),
            tag("div", x.name, class_="of-x", aria_hidden="true"),
            class_="plot",
        ),
        _numbers(title, x, found),
        class_="chart",
    )


def pair_bar(before: float, after: float, largest: float, words: str) -> Markup:
    """Return a small picture of two values on one scale from 0: a ring for before, a dot for after."""
    first, last = (_shown(10 + 980 * value / largest) if largest else "10" for value in (before, after))
    return tag(
        "svg",
        tag("line", x1="10", y1="20", x2="990", y2="20", class_="rail"),
        tag("line", x1=first, y1="20", x2=last, y2="20", class_="gap"),
        tag("path", d=f"M{first} 20h0", class_="ring"),
        tag("path", d=f"M{first} 20h0", class_="hole"),
        tag("path", d=f"M{last} 20h0", class_="dot"),
        viewBox="0 0 1000 40",
        preserveAspectRatio="none",
        role="img",
        aria_label=words,
        class_="pair",
    )


def pair_legend(before: str, after: str) -> Markup:
    """Return the legend of pair_bar."""
    ring = _sample(tag("path", d="M14 6h0", class_="ring"), tag("path", d="M14 6h0", class_="hole"))
    return tag("ul", tag("li", ring, before), tag("li", _sample(tag("path", d="M14 6h0", class_="dot")), after),
               class_="legend")  # fmt: skip


def two_bars(first: float, second: float, largest: float, words: str) -> Markup:
    """Return a small picture of two values as bars from 0, the first one outlined."""
    ends = [_shown(1000 * value / largest) if largest else "0" for value in (first, second)]
    bars = [tag("rect", x="0", y=place, width=end, height="14", class_=look)
            for place, end, look in zip(("3", "23"), ends, ("first", "second"), strict=True)]  # fmt: skip
    return tag("svg", bars, viewBox="0 0 1000 40", preserveAspectRatio="none", role="img", aria_label=words,
               class_="pair")  # fmt: skip


def thinned(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """Return at most so many points: means of groups that follow each other."""
    size = math.ceil(len(points) / most) if points else 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], math.fsum(y for _, y in group) / len(group)) for group in groups]


def scale_of(values: Iterable[float], axis: Axis) -> _Scale:
    """Return the scale that shows all values."""
    shown = [*values, *axis.includes]
    low, high = min(shown), max(shown)
    if high - low <= 1e-12 * abs(high):
        low, high = (low, low + 1) if axis.is_whole else (low - abs(low) / 10 - 1e-12, high + abs(high) / 10)
    step = _step((high - low) / (TICKS - 1), is_whole=axis.is_whole)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return _Scale(tuple(step * place for place in range(first, last + 1)))


def _step(least: float, *, is_whole: bool) -> float:
    """Return the smallest round number that is at least `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * times for times in (1, 2, 2.5, 5, 10) if power * times >= least * (1 - 1e-9))
    return max(1.0, math.ceil(step)) if is_whole else step


def _tick(value: float) -> Markup:
    return tag("span", tick_text(value))


def tick_text(value: float) -> str:
    """Return a round number without zeros at its end: 0.06, 4.2, 2,000, 1.5M, 2e-05."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.6g}{unit}"
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e4 else f"{value:.3g}"


def _shown(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")


def _grid(vertical: _Scale) -> list[Markup]:
    places = [_shown(HEIGHT * (1 - vertical.place(value))) for value in vertical.ticks]
    return [tag("line", x1="0", y1=y, x2=WIDTH, y2=y, class_="base" if number == 0 else "grid")
            for number, y in enumerate(places)]  # fmt: skip


def _kept(kept_to: float | None, horizontal: _Scale) -> Markup | None:
    if kept_to is None:
        return None
    x = _shown(WIDTH * horizontal.place(kept_to))
    return join([
        tag("rect", x="0", y="0", width=x, height=HEIGHT, class_="kept"),
        tag("line", x1=x, y1="0", x2=x, y2=HEIGHT, class_="edge"),
    ])  # fmt: skip


def _drawn(one: Series, horizontal: _Scale, vertical: _Scale) -> Markup:
    places = [(_shown(WIDTH * horizontal.place(x)), _shown(HEIGHT * (1 - vertical.place(y)))) for x, y in one.points]
    look = "faint" if one.look < 0 else f"s{one.look}"
    line = dots = None
    if one.has_line:
        line = tag("path", d="M" + "L".join(f"{x} {y}" for x, y in places), class_=f"line {look}")
    if one.has_dots or len(places) == 1:
        dots = tag("path", d="".join(f"M{x} {y}h0" for x, y in places), class_=f"dots {look}")
    return join([line, dots])


def _tips(series: Sequence[Series], x: Axis, horizontal: _Scale) -> list[Markup] | None:
    """Return columns without colour, each with the numbers that a pointer on it shows."""
    rows = _rows(series, MOST_TIPS)
    if len(rows) < 2:
        return None
    places = [WIDTH * horizontal.place(place) for place, _ in rows]
    between = [(a + b) / 2 for a, b in pairwise(places)]
    columns = []
    for (place, values), left, right in zip(rows, [0, *between], [*between, WIDTH], strict=True):
        words = ", ".join(f"{one.name} {number(values[one.name])}" for one in series if one.name in values)
        title = tag("title", f"{x.name} {tick_text(place)}: {words}")
        columns.append(tag("g", title, tag("rect", x=_shown(left), y="0", width=_shown(max(right - left, 0)),
                                           height=HEIGHT, class_="hit")))  # fmt: skip
    return columns


def _rows(series: Sequence[Series], most: int) -> list[tuple[float, dict[str, float]]]:
    """Return at most about so many x with the y of the series there."""
    places = sorted({x for one in series for x, _ in one.points})
    step = math.ceil(len(places) / most)
    chosen = {*places[::step], *places[-1:]} | {
        x for one in series if len(one.points) <= most // 4 for x, _ in one.points
    }
    known = [(one.name, dict(one.points)) for one in series]
    return [(x, {name: ys[x] for name, ys in known if x in ys}) for x in sorted(chosen)]


def _numbers(title: str, x: Axis, series: Sequence[Series]) -> Markup:
    """Return the numbers of a chart as a table; of long lines some."""
    rows = [
        tag("tr", tag("th", tick_text(place), scope="row"),
            (tag("td", number(values[one.name]) if one.name in values else "") for one in series))
        for place, values in _rows(series, MOST_ROWS)
    ]  # fmt: skip
    head = tag("tr", tag("th", x.name, scope="col"), (tag("th", one.name, scope="col") for one in series))
    table = tag("table", tag("caption", title), tag("thead", head), tag("tbody", rows))
    return tag("details", tag("summary", "Numbers"), tag("div", table, class_="scroll"))


def _in_words(one: Series, x: Axis) -> str:
    (first_x, first), (last_x, last) = one.points[0], one.points[-1]
    if len(one.points) == 1:
        return f"{one.name}: {number(first)} at {x.name} {tick_text(first_x)}"
    lowest, highest = min(y for _, y in one.points), max(y for _, y in one.points)
    return (
        f"{one.name}: {number(first)} at {x.name} {tick_text(first_x)}, {number(last)} at {tick_text(last_x)}, between "
        f"{number(lowest)} and {number(highest)}"
    )


def _legend(series: Sequence[Series]) -> Markup:
    return tag("ul", (tag("li", _sample(_swatch(one)), one.name) for one in series), class_="legend")


def _swatch(one: Series) -> Markup:
    look = "faint" if one.look < 0 else f"s{one.look}"
    line = tag("path", d="M1 6h26", class_=f"line {look}") if one.has_line else None
    return join([line, tag("path", d="M14 6h0", class_=f"dots {look}") if one.has_dots else None])


def _sample(*content: Markup) -> Markup:
    return tag("svg", content, viewBox="0 0 28 12", aria_hidden="true", class_="sample")
