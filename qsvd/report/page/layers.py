"""The errors of a quantized model by layer, and by layer and layer type."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qsvd.records import WeightError
from qsvd.report.errors import number
from qsvd.report.header import ReportHeader
from qsvd.report.page.charts import Axis, Series, line_chart
from qsvd.report.page.document import Section
from qsvd.report.page.markup import Markup, join, shortened, tag
from qsvd.report.totals import ROLES

MOST_LAYERS = 200  # of a chart and a map
LEVELS = 7  # of colour
PLACE = re.compile(r"(?P<stack>.*?)\.?\b(?P<number>\d+)\.")


@dataclass(frozen=True)
class Cell:
    """Several weights together: bits for each element, the mean rank, relative errors before and after."""

    bits: float
    rank: float
    before: float
    after: float


@dataclass(frozen=True)
class Measure:
    """What the map can show.

    Args:
        key: Of the classes of its cells.
        value, words: Of a cell.
    """

    key: str
    name: str
    value: Callable[[Cell], float]
    words: Callable[[Cell], str]


MEASURES = (
    Measure("a", "error after", lambda cell: cell.after, lambda cell: _short(cell.after)),
    Measure("b", "error before", lambda cell: cell.before, lambda cell: _short(cell.before)),
    Measure("c", "bits per element", lambda cell: cell.bits, lambda cell: f"{cell.bits:.2f}"),
    Measure("d", "rank", lambda cell: cell.rank, lambda cell: f"{cell.rank:.4g}"),
)


def _short(value: float) -> str:
    return f"{value:.4f}".lstrip("0") or "0" if value < 1 else f"{value:.3g}"


def by_layer(errors: Sequence[WeightError]) -> dict[tuple[str, int], list[WeightError]]:
    """Return the weights of every layer, by the words before the first number in their names and by this number."""
    found: dict[tuple[str, int], list[WeightError]] = {}
    for error in errors:
        if place := PLACE.match(error.name):
            found.setdefault((place["stack"], int(place["number"][:9])), []).append(error)
    stacks = list(dict.fromkeys(stack for stack, _ in found))
    return dict(sorted(found.items(), key=lambda item: (stacks.index(item[0][0]), item[0][1]))[:MOST_LAYERS])


def together(members: Sequence[WeightError]) -> Cell:
    """Return the bits, rank and errors of several weights; errors and norms add in squares."""
    sizes = [math.prod(error.shape) for error in members]
    norm = math.hypot(*(error.weight_frobenius for error in members)) or 1.0
    return Cell(
        bits=math.fsum(error.bits * size for error, size in zip(members, sizes, strict=True)) / sum(sizes),
        rank=sum(error.rank for error in members) / len(members),
        before=math.hypot(*(error.before.frobenius for error in members)) / norm,
        after=math.hypot(*(error.after.frobenius for error in members)) / norm,
    )


def _labels(layers: Sequence[tuple[str, int]]) -> list[str]:
    several = len({stack for stack, _ in layers}) > 1
    return [f"{shortened(stack, 40)} {index}" if several else str(index) for stack, index in layers]


def layers_section(header: ReportHeader, errors: Sequence[WeightError]) -> Section:
    """Return a chart of the errors before and after by layer."""
    layers = by_layer(errors)
    if not layers:
        words = "The names of the weights have no numbers of layers."
        return Section("layers", "Error by layer", tag("p", words, class_="none"))
    several = len({stack for stack, _ in layers}) > 1
    cells = [
        (float(place if several else index), together(members))
        for place, ((_, index), members) in enumerate(layers.items())
    ]
    lines = [
        Series(header.before, [(x, cell.before) for x, cell in cells], 1, has_dots=True),
        Series("with components", [(x, cell.after) for x, cell in cells], 0, has_dots=True),
    ]
    x = Axis("row of the map" if several else "layer", is_whole=True)
    chart = line_chart("Error by layer", x, Axis("relative error", includes=(0.0,)), lines)
    return Section("layers", "Error by layer", chart, _cut(errors, layers))


def _cut(errors: Sequence[WeightError], layers: dict[tuple[str, int], list[WeightError]]) -> str:
    shown = sum(map(len, layers.values()))
    lacking = sum(1 for error in errors if PLACE.match(error.name)) - shown
    return f"The first {MOST_LAYERS} layers." if lacking else ""


def map_section(header: ReportHeader, errors: Sequence[WeightError]) -> Section:
    """Return a table of layers by layer types; radio buttons choose what its cells show."""
    layers = by_layer(errors)
    if not layers:
        return Section("map", "Map of layers", tag("p", "Nothing to show.", class_="none"))
    roles = [role for role in ROLES if any(error.role == role for members in layers.values() for error in members)]
    cells = {
        (layer, role): together(chosen)
        for layer, members in layers.items()
        for role in roles
        if (chosen := [error for error in members if error.role == role])
    }
    ranges = {
        measure.key: (min(map(measure.value, cells.values())), max(map(measure.value, cells.values())))
        for measure in MEASURES
    }
    head = tag("tr", tag("th", "layer", scope="col"), (tag("th", role, scope="col") for role in roles))
    rows = [
        tag("tr", tag("th", label, scope="row"), (_cell(cells.get((layer, role)), ranges) for role in roles))
        for label, layer in zip(_labels(list(layers)), layers, strict=True)
    ]
    whole = tag("table", tag("caption", "Layers by layer type"), tag("thead", head), tag("tbody", rows))
    body = tag(
        "div",
        _choice(),
        tag("div", _legends(ranges), class_="legends"),
        tag("div", whole, class_="scroll tall", tabindex="0", role="region", aria_label="Map of layers"),
        class_="map",
    )
    note = f"Relative error: before is {header.before}, after is with components."
    return Section("map", "Map of layers", body, note)


def _choice() -> Markup:
    """Return the radio buttons; they stand before what they show, so that styles alone can choose."""
    buttons = []
    for one in MEASURES:
        key, is_first = f"show-{one.key}", one is MEASURES[0]
        button = tag("input", type="radio", name="measure", id=key, class_=f"pick {one.key}", checked=is_first)
        buttons += [button, tag("label", one.name, for_=key)]
    return join(buttons)


def _cell(cell: Cell | None, ranges: dict[str, tuple[float, float]]) -> Markup:
    if cell is None:
        return tag("td", "")
    levels = " ".join(f"{one.key}{level_of(one.value(cell), *ranges[one.key])}" for one in MEASURES)
    return tag("td", (tag("i", one.words(cell)) for one in MEASURES), class_=levels)


def level_of(value: float, low: float, high: float) -> int:
    """Return the level of colour of a value, 0 to LEVELS - 1; the middle one where all values are equal."""
    if high - low <= 1e-9 * abs(high):
        return 0
    return min(LEVELS - 1, int(LEVELS * (value - low) / (high - low)))


def _legends(ranges: dict[str, tuple[float, float]]) -> list[Markup]:
    found = []
    for one in MEASURES:
        low, high = (number(end) for end in ranges[one.key])
        if low == high:
            found.append(tag("p", f"{one.name}: {low} everywhere", class_=f"of-{one.key}"))
            continue
        steps = tag(
            "span", (tag("b", class_=f"h{level}") for level in range(LEVELS)), class_="ramp", aria_hidden="true"
        )
        found.append(tag("p", f"{one.name}: {low} ", steps, f" {high}", class_=f"of-{one.key}"))
    return found
