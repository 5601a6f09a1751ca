"""The page around the sections: head, styles, script, and a policy that allows nothing else."""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.resources import files

from qsvd.report.page.charts import Series
from qsvd.report.page.markup import Markup, join, shortened, tag

REFRESH = 5  # seconds
GENERATOR = '<meta name="generator" content="qsvd report">'  # near the start of every page


@dataclass(frozen=True)
class Section:
    """A part of the page. key is its id; from the code, as all ids are."""

    key: str
    title: str
    body: Markup
    note: str = ""


@dataclass(frozen=True)
class Number:
    """One of the large numbers at the head."""

    label: str
    value: str
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Subject:
    """What a page shows of one folder.

    Args:
        name: The folder, or the model.
        kind: "quantized model" or "run".
        sentence: What was done.
        facts: Rows of the table of several folders: a name, and the value as a cell.
        curves: Lines of charts of several folders: the name of the chart, and the line.
        roles: Relative error of each layer type, for a quantized model.
        is_finished: False of a run that goes on.
    """

    name: str
    kind: str
    sentence: str
    numbers: Sequence[Number]
    sections: Sequence[Section]
    facts: dict[str, str]
    curves: dict[str, Series] = field(default_factory=dict)
    roles: dict[str, float] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    is_finished: bool = True


def subject_page(subject: Subject, *, is_live: bool = False) -> str:
    """Return the page of one folder; with is_live it loads itself again while the run goes on."""
    state = None if subject.is_finished else tag("span", "not finished", class_="state")
    head = [
        tag("p", subject.kind, state, class_="kind"),
        tag("h1", shortened(subject.name)),
        tag("p", subject.sentence, class_="lead"),
        numbers(subject.numbers),
    ]
    return document(subject.name, head, subject.sections, refreshes=is_live and not subject.is_finished)


def numbers(found: Sequence[Number]) -> Markup:
    """Return large numbers with their names."""
    return tag(
        "dl",
        (
            tag("div", tag("dt", one.label), tag("dd", one.value, _unit(one.unit)),
                tag("dd", one.note, class_="note") if one.note else None)
            for one in found
        ),
        class_="numbers",
    )  # fmt: skip


def _unit(unit: str) -> Markup | None:
    return tag("span", f" {unit}", class_="unit") if unit else None


def warnings_section(warnings: Sequence[str]) -> Section:
    """Return the warnings, or that there are none."""
    if not warnings:
        return Section("warnings", "Warnings", tag("p", "None.", class_="none"))
    return Section("warnings", "Warnings", tag("ul", (tag("li", one) for one in warnings), class_="warnings"))


def document(title: str, head: Sequence[Markup], sections: Sequence[Section], *, refreshes: bool = False) -> str:
    """Return the whole page. It loads nothing: its policy allows its own style and script, by their digests."""
    style, script = (_resource(name) for name in ("style.css", "page.js"))
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    links = [tag("li", tag("a", one.title, href=f"#{one.key}")) for one in sections]
    header = tag(
        "head",
        tag("meta", charset="utf-8"),
        Markup(GENERATOR),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("meta", http_equiv="refresh", content=REFRESH) if refreshes else None,
        tag("title", f"{shortened(title)} - qsvd"),
        Markup(f"<style>{style}</style>"),
    )
    body = tag(
        "body",
        tag("a", "Skip to the numbers", href="#main", class_="skip"),
        tag(
            "header",
            tag("div", tag("span", "qsvd report", class_="brand"),
                tag("button", "Dark theme", id="theme", type="button", hidden=True), class_="top"),
            head,
            tag("nav", tag("ul", links), aria_label="Sections"),
        ),
        tag("main", (_section(one) for one in sections), id="main"),
        Markup(f"<script>{script}</script>"),
    )  # fmt: skip
    return f"<!DOCTYPE html>\n{tag('html', header, body, lang='en')}\n"


def _section(one: Section) -> Markup:
    note = tag("p", one.note, class_="note") if one.note else None
    heading = tag("h2", one.title, id=f"{one.key}-title")
    return join([Markup("\n"), tag("section", heading, note, one.body, id=one.key, aria_labelledby=f"{one.key}-title")])


def _resource(name: str) -> str:
    return (files("qsvd.report.page") / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"
