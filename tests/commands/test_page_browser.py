"""The page of `qsvd report --html` in a real browser, without a network."""

import json
import shutil

import pytest

from qsvd.records import Coverage, LeftTensors, Norms, WeightError
from qsvd.report.header import ReportHeader
from qsvd.report.page.document import subject_page
from qsvd.report.page.quantized import quantized_subject
from qsvd.report.page.run import RunRecords, run_subject
from qsvd.report.page.together import together_page
from tests.report.page.pages import steps_of, summary_of

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
NAME = "</script><img src=x onerror=alert(1)>\u202egnp.\x00\"'<svg onload=alert(1)>"
ROLES = ("q", "k", "v", "o", "gate", "up", "down")


@pytest.fixture(scope="module")
def browser():
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[dev]'")
    with api.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


def errors_of(layers=6):
    """Weights with errors that differ, and one with a hostile, very long name."""
    found = []
    for layer in range(layers):
        for place, role in enumerate(ROLES):
            after = 0.04 + 0.001 * layer + 0.002 * place
            norms = [Norms(size, 3 * size, 0.0, size / 4) for size in (0.09, after)]
            name = f"model.layers.{layer}.mlp.{role}_proj"
            found.append(WeightError(name, role, (64, 128), 8, 4.5 + place / 8, 1, 1.0, *norms))
    hostile = f"{NAME}{'x' * 5000}.layers.3.up"
    return [*found, WeightError(hostile, "up", (64, 64), 4, 5.0, 1, 1.0, Norms(0.1, 1, 0, 0.1), Norms(0.2, 1, 0, 0.1))]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A page of each kind, as files."""
    top = tmp_path_factory.mktemp("pages")
    left = (LeftTensors(f"{NAME}.weight", 1, 1200, NAME),)
    header = ReportHeader(NAME, "nf4", 8, "svd", 5, "svd", Coverage(43, 231, 1495, left))
    errors = errors_of()
    spectra = {error.name: [0.5 / (place + 1) for place in range(8)] for error in errors}
    model = quantized_subject(header, errors, 123_456, spectra)
    run = run_subject(NAME, RunRecords(None, steps_of(40), summary_of(base=NAME), f"qsvd train '{NAME}'", 40))
    texts = {"model": subject_page(model), "run": subject_page(run)}
    texts["together"] = together_page([NAME, "b"], [model, model])
    for name, text in texts.items():
        (top / f"{name}.html").write_text(text)
    return {name: top / f"{name}.html" for name in texts}


@pytest.fixture(scope="module")
def tabs(browser):
    """By whether scripts run: a tab, which opens every page with nothing stored; what it asked for; and its faults."""
    return {script: tab_of(browser.new_context(java_script_enabled=script)) for script in (True, False)}


def tab_of(context):
    context.add_init_script("localStorage.clear()")
    context.set_default_timeout(5000)
    tab, asked, faults = context.new_page(), [], []
    tab.on("console", lambda message: faults.append(message.text))
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("dialog", lambda dialog: (faults.append(dialog.message), dialog.dismiss()))
    tab.on("request", lambda request: asked.append(request.url))
    return tab, asked, faults


@pytest.fixture
def visit(tabs, files):
    """Open a page; whatever it asks of a network, or writes to the console, fails the test."""
    addresses = {True: [], False: []}

    def visit(name, width=1280, scheme="light", script=True):
        tab = tabs[script][0]
        tab.set_viewport_size({"width": width, "height": 900})
        tab.emulate_media(media="screen", color_scheme=scheme)
        addresses[script].append(files[name].as_uri())
        tab.goto(addresses[script][-1])
        return tab

    yield visit
    seen = {script: (asked.copy(), faults.copy()) for script, (_, asked, faults) in tabs.items()}
    for _, asked, faults in tabs.values():
        asked.clear()
        faults.clear()
    assert seen == {script: (asked, []) for script, asked in addresses.items()}


def luminance(colour):
    parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


TEXTS = """[...document.querySelectorAll('body *')].flatMap((e) => {
  const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  if (!own || e.closest('svg, script, style') || !e.checkVisibility()) return [];
  let at = e;
  while (at && getComputedStyle(at).backgroundColor === 'rgba(0, 0, 0, 0)') at = at.parentElement;
  const back = getComputedStyle(at || document.body).backgroundColor;
  return [[getComputedStyle(e).color, back, e.textContent.slice(0, 30)]];
})"""


@pytest.mark.parametrize("name", ["model", "run", "together"])
def test_a_page_fits_a_phone_and_every_text_has_a_contrast_of_at_least_four_and_a_half(visit, name):
    """WCAG 2.2, 1.4.3: the ratio of relative luminances."""
    for width, scheme in ((1280, "light"), (375, "dark")):
        page = visit(name, width, scheme)
        inside, outside = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert inside <= outside == width
        assert page.locator("h1").count() == 1
        assert page.locator("img, iframe, object, link, svg[onload]").count() == 0
        found = {}
        for front, back, text in page.evaluate(TEXTS):
            high, low = sorted((luminance(front), luminance(back)), reverse=True)
            found[front, back] = (text, (high + 0.05) / (low + 0.05))
        assert len(found) > (5 if name == "model" else 2)
        assert {pair: words for pair, words in found.items() if words[1] < 4.5} == {}


def test_hostile_names_are_shown_as_text(visit):
    page = visit("model")
    assert "</script><img src=x onerror=alert(1)>" in page.inner_text("h1")
    assert "\\u202e" in page.inner_text("h1")
    assert "\\x00" in page.inner_text("h1")
    assert page.locator("script").count() == 1
    assert all(len(name) < 200 for name in page.locator("tbody th").all_inner_texts())


def column(page, number):
    return page.locator(f"table.sorts tbody tr:not([hidden]) > :nth-child({number})").all_inner_texts()


def test_the_table_sorts_by_pointer_and_by_keyboard(visit):
    page = visit("model")
    bits = page.get_by_role("button", name="bits", exact=True)
    bits.click()
    values = [float(text) for text in column(page, 5)]
    assert values == sorted(values, reverse=True)
    assert page.locator("th[aria-sort=descending]").inner_text() == "bits"
    bits.press("Enter")
    assert [float(text) for text in column(page, 5)] == sorted(values)
    assert page.locator("th[aria-sort=ascending]").count() == 1
    page.get_by_role("button", name="layer", exact=True).press("Space")
    names = column(page, 1)
    assert [name for name in names if name.startswith("model.")] == [
        error.name for error in sorted(errors_of(), key=lambda error: error.name) if error.name.startswith("model.")
    ]


def test_the_filter_leaves_the_rows_that_fit(visit):
    page = visit("model")
    page.locator("#filter").fill("layers.2.")
    assert len(column(page, 1)) == len(ROLES)
    page.locator("#role").select_option("gate")
    assert column(page, 1) == ["model.layers.2.mlp.gate_proj"]
    assert page.get_by_role("status").inner_text() == "1 of 43 shown"


def test_the_button_changes_the_theme_and_says_so(visit):
    ground, grounds = "getComputedStyle(document.body).backgroundColor", set()
    for scheme in ("light", "dark"):
        page = visit("model", scheme=scheme)
        button = page.get_by_role("button", name="Dark theme")
        before = page.evaluate(ground)
        assert button.get_attribute("aria-pressed") == json.dumps(scheme == "dark")
        button.press("Enter")
        assert page.evaluate(ground) != before
        assert button.get_attribute("aria-pressed") == json.dumps(scheme == "light")
        grounds.add(before)
    assert len(grounds) == 2


@pytest.mark.parametrize("script", [True, False])
def test_the_map_shows_what_is_chosen_and_without_script_everything_is_readable_and_nothing_is_dead(visit, script):
    page = visit("model", script=script)
    assert (page.locator("button:visible, input[type=search]:visible").count() > 0) == script
    assert len(column(page, 1)) == 43
    cell = page.locator(".map tbody tr:first-child td").first
    assert cell.inner_text() == ".0400"
    page.locator("#show-a").focus()
    page.keyboard.press("ArrowRight")
    assert cell.inner_text() == ".0900"
    page.get_by_text("bits per element", exact=True).click()
    assert cell.inner_text() == "4.50"


FOCUS = """(() => {
  const e = document.activeElement, shown = e.matches('.pick') ? e.nextElementSibling : e;
  const name = e === document.body ? '' : e.id || e.textContent.slice(0, 20);
  return [name, getComputedStyle(shown).outlineStyle];
})()"""


def test_the_keyboard_reaches_every_control_and_the_focus_is_seen(visit):
    page = visit("model")
    seen = []
    for _ in range(45):
        page.keyboard.press("Tab")
        seen.append(page.evaluate(FOCUS))
    names = [name for name, _ in seen]
    assert {"theme", "filter", "role", "show-a", "bits"} <= {*names}
    assert {outline for name, outline in seen if name} <= {"solid", "auto"}


def test_a_print_has_all_rows_and_no_controls(visit):
    page = visit("model")
    page.emulate_media(media="print")
    assert page.locator("#theme:visible, nav:visible, .tools:visible, summary:visible").count() == 0
    box = page.locator(".tall").evaluate("e => [e.scrollHeight, e.clientHeight]")
    assert box[0] <= box[1]
