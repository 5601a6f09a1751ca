"""The page of a quantized model: what was done, and the error by layer type, by layer, and of every weight."""

from collections.abc import Mapping, Sequence

from qsvd.errors import listing, show_size
from qsvd.records import WeightError
from qsvd.report.errors import number, short_count, weighted_in_words
from qsvd.report.header import ReportHeader
from qsvd.report.page.charts import Axis, Series, line_chart, pair_bar, pair_legend
from qsvd.report.page.document import Number, Section, Subject, warnings_section
from qsvd.report.page.layers import layers_section, map_section
from qsvd.report.page.markup import Markup, join, tag
from qsvd.report.page.tables import Head, name_cell, table
from qsvd.report.totals import MODEL, Total, reduction, relative, totals

MOST_WEIGHTS = 700  # rows of the table of weights
SPECTRUM_LAYERS = 3  # of a layer type: the first, one in the middle, the last
MOST_SPECTRA = 12  # layer types
MOST_VALUES = 24  # of a spectrum that is drawn


def quantized_subject(
    header: ReportHeader,
    errors: Sequence[WeightError],
    num_bytes: int,
    spectra: Mapping[str, Sequence[float]],
) -> Subject:
    """Return what a page shows of a quantized model.

    Args:
        num_bytes: Of its safetensors files.
        spectra: Singular values of the stored components B A, largest first, of those `spectrum_layers` names.
    """
    sums = totals(errors) if errors else []
    sections = [] if not errors else _sections(header, errors, sums, spectra)
    warnings = _warnings(header, errors)
    return Subject(
        name=header.model,
        kind="quantized model",
        sentence=_sentence(header),
        numbers=_numbers(header, sums, num_bytes),
        sections=[*sections, warnings_section(warnings), _rest(header)],
        facts=_facts(header, sums, num_bytes),
        roles={total.role: relative(total)[1] for total in sums},
        warnings=warnings,
    )


def spectrum_layers(errors: Sequence[WeightError]) -> list[str]:
    """Return the layers whose singular values are shown: of each layer type the first, a middle and the last one."""
    by_role: dict[str, list[str]] = {}
    for error in errors:
        if error.rank > 0:
            by_role.setdefault(error.role, []).append(error.name)
    return [name for names in list(by_role.values())[:MOST_SPECTRA] for name in _spread(names, SPECTRUM_LAYERS)]


def _spread(names: Sequence[str], count: int) -> list[str]:
    if len(names) <= count:
        return list(names)
    return [names[place * (len(names) - 1) // (count - 1)] for place in range(count)]


def _sentence(header: ReportHeader) -> str:
    layers = f"{header.coverage.weights:,} {'layer' if header.coverage.weights == 1 else 'layers'}"
    share = f"{100 * header.coverage.share:.1f} % of the model's numbers"
    codec = header.before.removesuffix(" alone")
    if header.iterations == 0:
        return f"{layers} ({share}) were drawn at random in {codec}: no weight was quantized, so there is no error."
    if header.rank == 0:
        return f"{layers} ({share}) were quantized to {codec}, without components."
    rank = "1 singular component" if header.rank == 1 else f"{header.rank} singular components"
    most = f"at most {rank}" if header.least_rank not in (None, header.rank) else f"the largest {rank}"
    kept = "the largest singular component" if most == "the largest 1 singular component" else most
    return f"{layers} ({share}) were quantized to {codec}; {kept} of each stayed in 16 bits."


def _numbers(header: ReportHeader, sums: Sequence[Total], num_bytes: int) -> list[Number]:
    size = Number("Size on disk", *show_size(num_bytes).rsplit(" ", 1), note="all safetensors files")
    if not sums:
        return [size]
    whole = sums[-1]
    before, after = relative(whole)
    change = reduction(whole).frobenius
    words = f"{abs(change):.1f} % {'smaller' if change >= 0 else 'larger'}"
    return [
        Number("Bits per element", f"{whole.bits:.3f}", note="of quantized layers, components included"),
        Number("Error before", number(before), note=header.before),
        Number("Error after", number(after), note=words if header.rank else "no components"),
        size,
    ]


def _sections(
    header: ReportHeader, errors: Sequence[WeightError], sums: Sequence[Total], spectra: Mapping[str, Sequence[float]]
) -> list[Section]:
    return [
        _roles(header, sums),
        layers_section(header, errors),
        map_section(header, errors),
        _spectra(errors, spectra),
        _weights(header, errors),
    ]


def _roles(header: ReportHeader, sums: Sequence[Total]) -> Section:
    largest = max(max(relative(total)) for total in sums)
    heads = [
        Head("layer type", is_number=False), Head("layers", is_minor=True), Head("elements", is_minor=True),
        Head("bits", is_minor=True), Head("before"), Head("after"), Head("reduced by (%)", is_minor=True),
        Head(f"0 to {number(largest)}", is_number=False),
    ]  # fmt: skip
    rows = []
    for total in sums:
        before, after = relative(total)
        name = "all" if total.role == MODEL else total.role
        bar = pair_bar(before, after, largest, f"{number(before)} before, {number(after)} after")
        rows.append([name, f"{total.weights:,}", short_count(total.elements), number(total.bits), number(before),
                     number(after), f"{reduction(total).frobenius:.1f}", bar])  # fmt: skip
    body = join([
        pair_legend(f"before: {header.before}", "after: with components"),
        table("Relative error by layer type", heads, rows, total=True),
    ])  # fmt: skip
    note = "Frobenius norm of the error over that of the weights: 0 is exact, 1 is as large as the weights."
    return Section("types", "Error by layer type", body, note)


def _spectra(errors: Sequence[WeightError], spectra: Mapping[str, Sequence[float]]) -> Section:
    by_role: dict[str, list[WeightError]] = {}
    for error in errors:
        if spectra.get(error.name):
            by_role.setdefault(error.role, []).append(error)
    if not by_role:
        words = "No components are stored, so no singular value is known."
        return Section("spectra", "Singular values", tag("p", words, class_="none"))
    charts = [_spectrum(role, members, spectra) for role, members in by_role.items()]
    note = (
        "Of the stored components B A, over the Frobenius norm of the weight, in three layers of each type. The shaded "
        "part is kept; the dots to its right are the largest singular value of the remaining error W - Q - B A. All "
        "other singular values are not stored."
    )
    return Section("spectra", "Singular values", tag("div", charts, class_="charts small"), note)


def _spectrum(role: str, members: Sequence[WeightError], spectra: Mapping[str, Sequence[float]]) -> Markup:
    rank = max(len(spectra[error.name]) for error in members)
    end = rank + max(1.0, rank / 8)  # where the error is marked
    lines = []
    for look, error in enumerate(members):  # the colour and the dashes are those of the place, in every chart
        size, name = error.weight_frobenius or 1.0, error.name.removesuffix(".weight")
        values = [(float(place), value / size) for place, value in enumerate(spectra[error.name], start=1) if value > 0]
        lines.append(Series(_short(name), _thin(values), look))
        if error.after.spectral > 0:
            lines.append(Series(f"error of {_short(name)}", [(end, error.after.spectral / size)], look, is_named=False))
    x = Axis("component", includes=(0.0, end))
    return line_chart(role, x, Axis("of the norm of W", includes=(0.0,)), lines, kept_to=rank + 0.5)


def _short(name: str) -> str:
    """Return the part of a name that tells layers of one type apart: "layers.3"."""
    parts = name.split(".")
    places = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[max(places[0] - 1, 0) : places[-1] + 1]) if places else name


def _thin(values: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    step = -(-len(values) // MOST_VALUES) if values else 1
    return [value for place, value in enumerate(values) if place % step == 0 or place == len(values) - 1]


WEIGHT_HEADS = (
    Head("layer", is_number=False),
    Head("type", is_number=False, is_minor=True),
    Head("shape (out x in)", is_minor=True),
    Head("rank", is_minor=True),
    Head("bits"),
    Head("before"),
    Head("after"),
    Head("reduced by (%)", is_minor=True),
)


def _weights(header: ReportHeader, errors: Sequence[WeightError]) -> Section:
    order = sorted(errors, key=lambda error: (-relative(error)[1], error.name))[:MOST_WEIGHTS]
    rows = [_weight(error) for error in order]
    roles = dict.fromkeys(error.role for error in order)
    options = [tag("option", "all types", value=""), *(tag("option", role, value=role) for role in roles)]
    tools = tag(
        "div",
        tag("label", "Layer ", tag("input", type="search", id="filter", placeholder="part of a name")),
        tag("label", "Type ", tag("select", options, id="role")),
        tag("p", role="status", id="count"),
        class_="tools",
        hidden=True,
    )
    cut = ""
    if len(errors) > len(order):
        cut = f" The {len(order):,} with the largest error of {len(errors):,}; errors.jsonl has all."
    note = f"Relative error: before is {header.before}, after is with components. Largest first.{cut}"
    return Section("weights", "All weights", join([tools, table("Weights", WEIGHT_HEADS, rows, sorts=True)]), note)


def _weight(error: WeightError) -> list[str | Markup]:
    before, after = relative(error)
    rows, columns = error.shape
    return [
        name_cell(error.name.removesuffix(".weight")), error.role, f"{rows} x {columns}", str(error.rank),
        number(error.bits), number(before), number(after), f"{reduction(error).frobenius:.1f}",
    ]  # fmt: skip


def _warnings(header: ReportHeader, errors: Sequence[WeightError]) -> list[str]:
    larger = [error.name.removesuffix(".weight") for error in errors if error.after.frobenius > error.before.frobenius]
    found = []
    if larger:
        found.append(f"The error is larger with components than with {header.before} in {listing(larger)}.")
    if header.coverage.unknown:
        found.append(f"Copied as they are, since the model has no such tensors: {header.remainder}.")
    if header.kept:
        found.append(header.kept.replace("`", ""))
    if weighted := weighted_in_words(header, errors):
        found.append(weighted)
    return found


def _rest(header: ReportHeader) -> Section:
    heads = [Head("tensors", is_number=False), Head("count"), Head("elements"), Head("why", is_number=False)]
    rows = [[name_cell(left.pattern), f"{left.count:,}", f"{left.elements:,}", left.reason or "not a linear layer"]
            for left in header.coverage.left]  # fmt: skip
    body = join([
        tag("p", f"{header.method}."),
        tag("p", f"{header.reach}."),
        table("Tensors that stay in 16 bits", heads, rows) if rows else None,
    ])  # fmt: skip
    return Section("method", "Method and coverage", body)


def _facts(header: ReportHeader, sums: Sequence[Total], num_bytes: int) -> dict[str, str]:
    found = {"model": header.model, "method": header.method, "layers": f"{header.coverage.weights:,}"}
    if sums:
        before, after = relative(sums[-1])
        found |= {
            "bits per element": f"{sums[-1].bits:.3f}",
            "error before": number(before),
            "error after": number(after),
            "reduced by (%)": f"{reduction(sums[-1]).frobenius:.1f}",
        }
    return found | {"size on disk": show_size(num_bytes)}
