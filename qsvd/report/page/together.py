"""A page of several folders: their numbers in one table, and their curves in one chart."""

from collections.abc import Sequence
from dataclasses import replace

from qsvd.report.errors import number
from qsvd.report.page.charts import Axis, Series, line_chart
from qsvd.report.page.document import Section, Subject, document, warnings_section
from qsvd.report.page.markup import Markup, join, shortened, tag
from qsvd.report.page.tables import Head, name_cell, table
from qsvd.report.totals import MODEL, ROLES

AXES = {"Training loss": "nats", "Held-out loss": "nats"}  # the unit of each chart


def together_page(names: Sequence[str], subjects: Sequence[Subject], *, is_live: bool = False) -> str:
    """Return the page of several folders.

    Args:
        names: Of the folders, in the order of the subjects; equal ones are numbered.
    """
    labels = _labels(names)
    kinds = list(dict.fromkeys(subject.kind for subject in subjects))
    sections = [_numbers(kind, labels, subjects) for kind in kinds]
    sections += [*_curves(labels, subjects), *_roles(labels, subjects), _done(labels, subjects)]
    warnings = [
        f"{label}: {warning}" for label, subject in zip(labels, subjects, strict=True) for warning in subject.warnings
    ]
    several = " and ".join(f"{kind}s" for kind in kinds)
    head = [
        tag("p", several, class_="kind"),
        tag("h1", f"{len(subjects)} {several}"),
        tag("p", ", ".join(shortened(label) for label in labels), class_="lead"),
    ]
    goes_on = is_live and any(not subject.is_finished for subject in subjects)
    return document(f"{len(subjects)} {several}", head, [*sections, warnings_section(warnings)], refreshes=goes_on)


def _labels(names: Sequence[str]) -> list[str]:
    return [f"{name} ({place})" if names.count(name) > 1 else name for place, name in enumerate(names, start=1)]


def _numbers(kind: str, labels: Sequence[str], subjects: Sequence[Subject]) -> Section:
    """Return the table of all folders of one kind: a column for each."""
    chosen = [(label, subject) for label, subject in zip(labels, subjects, strict=True) if subject.kind == kind]
    rows = list(dict.fromkeys(name for _, subject in chosen for name in subject.facts))
    heads = [Head("", is_number=False), *(Head(shortened(label, 40)) for label, _ in chosen)]
    lines = [[name, *(name_cell(subject.facts.get(name, "")) for _, subject in chosen)] for name in rows]
    return Section(kind.replace(" ", "-"), f"Numbers of the {kind}s", wide(table(f"{kind}s", heads, lines)))


def wide(content: Markup) -> Markup:
    """Return a table whose cells may break, since they hold sentences."""
    return tag("div", content, class_="wide")


def _curves(labels: Sequence[str], subjects: Sequence[Subject]) -> list[Section]:
    charts: dict[str, list[Series]] = {}
    for look, (label, subject) in enumerate(zip(labels, subjects, strict=True)):
        for name, line in subject.curves.items():
            charts.setdefault(name, []).append(replace(line, name=shortened(label, 40), look=look))
    if not charts:
        return []
    x = Axis("step", includes=(0.0,), is_whole=True)
    body = [line_chart(name, x, Axis(AXES.get(name, "")), lines) for name, lines in charts.items()]
    return [Section("curves", "Curves", tag("div", body, class_="charts"))]


def _roles(labels: Sequence[str], subjects: Sequence[Subject]) -> list[Section]:
    """Return the errors by layer type, a column for each quantized model, the smallest of a row marked."""
    chosen = [(label, subject.roles) for label, subject in zip(labels, subjects, strict=True) if subject.roles]
    if len(chosen) < 2:
        return []
    heads = [Head("layer type", is_number=False), *(Head(shortened(label, 40)) for label, _ in chosen)]
    lines = []
    for role in (*ROLES, MODEL):
        known = [roles[role] for _, roles in chosen if role in roles]
        if known:
            cells = [_value(roles.get(role), min(known)) for _, roles in chosen]
            lines.append(["all" if role == MODEL else role, *cells])
    body = table("Relative error with components by layer type", heads, lines, total=True)
    note = "Relative error with components. The smallest of a row is bold and has a star."
    return [Section("types", "Error by layer type", body, note)]


def _value(value: float | None, least: float) -> str | Markup:
    if value is None:
        return ""
    return tag("b", f"{number(value)} *") if value == least else number(value)


def _done(labels: Sequence[str], subjects: Sequence[Subject]) -> Section:
    lines = [
        join([tag("dt", name_cell(label)), tag("dd", subject.sentence)])
        for label, subject in zip(labels, subjects, strict=True)
    ]
    return Section("done", "What was done", tag("dl", lines, class_="done"))
