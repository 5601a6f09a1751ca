"""Pages without a browser: sizes, bytes, escapes, places of points, and what the records say."""

import math
import re
from base64 import b64encode
from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest

from qsvd.errors import BadInput
from qsvd.prepare.using.pages import subject_of
from qsvd.records import Coverage, Norms, Start, Texts, WeightError, Written
from qsvd.report.header import ReportHeader
from qsvd.report.page.charts import Axis, Series, line_chart, scale_of, thinned, tick_text
from qsvd.report.page.comparison import comparison_subject
from qsvd.report.page.document import subject_page
from qsvd.report.page.layers import by_layer, level_of
from qsvd.report.page.markup import escaped, tag
from qsvd.report.page.quantized import quantized_subject, spectrum_layers
from qsvd.report.page.run import FEW, SMOOTH, RunRecords, run_subject
from qsvd.report.page.together import together_page
from tests.report.page.pages import Page, steps_of, summary_of

HOSTILE = "</script><img src=x onerror=alert(1)>\u202e\x00\x1b[2J'\"&<!--"
ROLES = ("q", "k", "v", "o", "gate", "up", "down")
HEADER = ReportHeader("tiny", "nf4", 4, "svd", 5, "svd", Coverage(5, 231, 1495, ()))


def weights(layers, name="model.layers.{}.self_attn.{}_proj"):
    norms = Norms(0.09, 1.0, 0.0, 0.02), Norms(0.06, 0.7, 0.0, 0.01)
    return [
        WeightError(name.format(layer, role), role, (4096, 4096), 64, 4.5, 1, 1.0, *norms)
        for layer in range(layers)
        for role in ROLES
    ]


def page_of(errors, header=HEADER, spectra=None):
    return subject_page(quantized_subject(header, errors, 12_300_000, spectra or {}))


def test_the_page_has_the_numbers_of_the_records(samples, header):
    page = Page(page_of(samples.errors, header))
    norm = math.sqrt(sum((triple[0] ** 2).sum() for triple in samples.matrices))
    for place in (1, 2):
        error = math.sqrt(sum((triple[place] ** 2).sum() for triple in samples.matrices))
        assert f"{error / norm:.5f}"[:6] in page.text
    assert "12.3" in page.text
    larger = [
        error.name.removesuffix(".weight")
        for error, (_, before, after) in zip(samples.errors, samples.matrices, strict=True)
        if (after**2).sum() > (before**2).sum()
    ]
    words = f"The error is larger with components than with {header.before} in {', '.join(larger)}."
    assert (words in page.texts) == bool(larger)
    assert page.open == ["html"] or not page.open


def test_six_hundred_weights_with_spectra_fit_in_500_kb_and_more_do_not_grow_it():
    errors = weights(86)
    spectra = {name: [1 / place for place in range(1, 513)] for name in spectrum_layers(errors)}
    page = page_of(errors, spectra=spectra)
    assert len(spectra) == 3 * len(ROLES)
    assert len(page.encode()) < 500_000
    many = page_of(weights(3000, "m.layers.{}." + "x" * 300 + ".{}"))
    assert len(many.encode()) < 500_000
    assert "The 700 with the largest error of 21,000; errors.jsonl has all." in Page(many).text


def test_the_same_records_give_the_same_bytes():
    assert page_of(weights(2)) == page_of(weights(2))


def test_the_policy_allows_the_styles_and_the_script_of_the_page_alone():
    text = page_of(weights(2))
    policy = re.search('Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    for name in ("style", "script"):
        inside = re.search(f"<{name}>(.*?)</{name}>", text, re.DOTALL)[1]
        assert f"{name}-src 'sha256-{b64encode(sha256(inside.encode()).digest()).decode()}'" in policy
    page = Page(text)
    assert not {"style", *(f"on{event}" for event in ("click", "error", "load"))} & {
        name for _, attributes in page.elements for name in attributes
    }
    assert all(attributes["href"].startswith("#") for attributes in page.all("a"))
    assert not re.search("https?://|url\\(|@import|src=", text)


@pytest.mark.parametrize("kind", ["model", "run", "together"])
def test_no_text_becomes_an_element(kind):
    header = replace(HEADER, model=HOSTILE)
    errors = [replace(weights(1)[0], name=f"{HOSTILE}{'y' * 10_000}.layers.0.q", after=Norms(0.2, 1, 0, 0.1))]
    model = quantized_subject(header, errors, 1, {errors[0].name: [0.5, 0.2]})
    texts = Texts(9, (Written(HOSTILE, HOSTILE, f"</dd>{HOSTILE}\n{'y' * 10_000}", HOSTILE),))
    run = run_subject(HOSTILE, RunRecords(None, steps_of(3), summary_of(base=HOSTILE), HOSTILE, texts=texts))
    text = {
        "model": subject_page(model),
        "run": subject_page(run),
        "together": together_page([HOSTILE, HOSTILE], [run, model]),
    }[kind]
    page = Page(text)
    assert len(page.all("script")) == len(page.all("style")) == 1
    assert not page.all("img")
    assert not {"\x00", "\x1b", "\u202e"} & {*text}
    assert max(map(len, page.texts)) < 5000


def test_a_text_in_an_attribute_or_an_element_is_escaped_once():
    assert tag("p", "<b>", title='"&') == '<p title="&quot;&amp;">&lt;b&gt;</p>'
    assert tag("p", tag("b", "x & y"), None, ["<", 3]) == "<p><b>x &amp; y</b>&lt;3</p>"
    assert escaped("a\u2066b\x07") == "a\\u2066b\\x07"
    with pytest.raises(AssertionError, match="stand in the code"):
        tag("p onclick=x")


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.0, 0.093], [0, 0.025, 0.05, 0.075, 0.1]),
        ([1, 14], [0, 5, 10, 15]),
        ([4.05, 4.23], [4.05, 4.1, 4.15, 4.2, 4.25]),
        ([2e-5], None),
        ([0.0, 0.0], None),
    ],
)
def test_ticks_are_round_and_at_equal_distances_and_hold_all_values(values, ticks):
    scale = scale_of(values, Axis("x"))
    steps = {round(b - a, 12) for a, b in zip(scale.ticks, scale.ticks[1:], strict=False)}
    assert len(steps) == 1
    assert scale.ticks[0] <= min(values) + 1e-12 <= max(values) + 1e-12 <= scale.ticks[-1] + 2e-12
    if ticks:
        assert list(scale.ticks) == pytest.approx(ticks)


def test_a_point_stands_where_its_scale_says():
    text = line_chart(
        "t", Axis("x", includes=(0.0,)), Axis("y", includes=(0.0,)), [Series("s", [(0, 0), (5, 1), (10, 2)])]
    )
    path = re.search('d="M([^"]*)" class="line', text)[1]
    assert [tuple(map(float, pair.split())) for pair in path.split("L")] == [(0, 400), (500, 200), (1000, 0)]
    assert "s: 0 at x 0, 2.000 at 10, between 0 and 2.000" in text
    assert '<th scope="row">5</th><td>1.000</td>' in text


def test_long_curves_are_means_of_groups():
    found = thinned([(float(x), float(x % 2)) for x in range(1, 1201)], most=300)
    assert len(found) == 300
    assert found[0] == (4.0, 0.5)


@pytest.mark.parametrize(
    ("value", "text"), [(0.06, "0.06"), (2000, "2,000"), (1.5e6, "1.5M"), (2e-5, "2e-05"), (0, "0")]
)
def test_ticks_have_no_zeros_at_their_end(value, text):
    assert tick_text(value) == text


def test_layers_are_sorted_by_their_number_within_their_stack():
    names = ["enc.block.10.q", "enc.block.2.q", "dec.block.0.layer.1.q", "pooler"]
    errors = [replace(weights(1)[0], name=name) for name in names]
    assert list(by_layer(errors)) == [("enc.block", 2), ("enc.block", 10), ("dec.block", 0)]


def test_levels_of_colour_go_from_the_lowest_to_the_highest_value():
    assert [level_of(value, 1.0, 2.0) for value in (1.0, 1.5, 2.0)] == [0, 3, 6]
    assert level_of(3.0, 3.0, 3.0) == 0


def test_a_run_that_goes_on_refreshes_its_page_only_if_asked():
    going = run_subject("r", RunRecords(Start(4.0), steps_of(30), None, "qsvd train x", 100))
    assert '<meta http-equiv="refresh" content="5">' in subject_page(going, is_live=True)
    assert 'http-equiv="refresh"' not in subject_page(going)
    done = run_subject("r", RunRecords(Start(4.0), steps_of(40), summary_of(), "qsvd train x", 40))
    assert 'http-equiv="refresh"' not in subject_page(done, is_live=True)
    assert "30 of 100 steps are recorded" in subject_page(going)


def test_a_run_shows_losses_memory_and_its_command():
    text = Page(
        subject_page(run_subject("r", RunRecords(Start(3.95), steps_of(40), summary_of(), "qsvd train x", 40)))
    ).text
    for words in ("the held-out loss fell from 3.950 to 2.900 nats", "qsvd train x", "3.5", "4.0", "200.0", "pissa"):
        assert words in text


def test_the_running_mean_is_the_weighted_mean_of_all_losses_so_far():
    losses = np.random.default_rng(0).uniform(1, 3, 60)
    for count, curve in ((60, "running mean"), (FEW, "running mean"), (FEW - 1, "batch"), (1, "batch")):
        steps = [replace(step, loss=loss) for step, loss in zip(steps_of(count, 10), losses, strict=False)]
        drawn = run_subject("r", RunRecords(Start(3.95), steps, None)).curves
        weights = SMOOTH ** np.arange(count)
        means = [np.average(losses[: n + 1], weights=weights[n::-1] if n else [1.0]) for n in range(count)]
        expected = means if curve == "running mean" else losses[:count]
        assert drawn["Training loss"].name == curve
        points = [*zip(range(1, count + 1), (pytest.approx(value, rel=1e-12) for value in expected), strict=True)]
        assert [*drawn["Training loss"].points] == points
        held_out = [(0.0, 3.95)] + [(step.number, step.held_out) for step in steps if step.held_out is not None]
        assert [*drawn["Held-out loss"].points] == held_out


def test_a_run_shows_what_the_model_writes_before_and_after_training():
    texts = Texts(8, (Written("Q: 1 <b>\nA:", "2", "three\n\x07four", ""), Written("P", "q", "r")))
    page = Page(subject_page(run_subject("r", RunRecords(None, steps_of(3), None, texts=texts))))
    assert "Q: 1 <b>\nA:" in page.texts
    assert "three\n\\x07four" in page.texts
    assert [page.texts.count(word) for word in ("Prompt", "After training", "(nothing)")] == [2, 1, 1]
    assert "at most 8 tokens" in page.text


def test_only_the_section_of_the_machine_depends_on_times_and_memory():
    slow = summary_of(seconds=99.0, memory={"residual": 1, "peak": 9}, first_step_seconds=7.0)
    steps = [replace(step, seconds=step.seconds * 3, peak_bytes=7) for step in steps_of(40)]
    pages = [
        subject_page(run_subject("r", RunRecords(None, some, summary, "c", 40)))
        for some, summary in ((steps_of(40), summary_of()), (steps, slow))
    ]
    assert pages[0] != pages[1]
    cut = [re.sub('<section id="machine".*?</section>', "", page, flags=re.DOTALL) for page in pages]
    assert cut[0] == cut[1]


def test_several_folders_stand_side_by_side():
    other = [replace(error, after=Norms(0.03, 1, 0, 0.01)) for error in weights(2)]
    subjects = [quantized_subject(HEADER, errors, 1000, {}) for errors in (weights(2), other)]
    page = Page(together_page(["out", "out"], subjects))
    assert "out (1)" in page.texts
    assert page.texts.count("0.03000 *") == len(ROLES) + 1
    assert "0.06000" in page.texts


def compared(method, loss, **changes):
    """A row of results.jsonl."""
    known = {
        "method": method, "split": "rank 0", "rank": 16, "stored_rank": 0, "trained_parameters": 1000, "num_bytes": 100,
        "adapter_parameters": 1000, "note": "", "best_rate": 1e-3, "test_loss": loss, "test_loss_deviation": 0.01,
        "test_accuracy": None, "paired": {"difference": -0.25, "p_holm": 0.04}, "seeds": [0, 1, 2],
        "rates": [{"learning_rate": rate, "valid_loss": found} for rate, found in ((1e-3, loss), (1e-2, None))],
    }  # fmt: skip
    return known | changes


def test_a_comparison_has_its_rows_its_sweeps_and_its_command():
    head = {"model": "m", "equal": "rank", "size": 16, "seeds": 3, "command": "qsvd compare m d --out DIR"}
    rows = [compared("lora", 2.5, paired=None), compared(HOSTILE, 2.25, note="not tuned"), compared("dora", None)]
    left = [{"method": "pissa", "split": "rank 0", "reason": "has no components"}]
    subject = comparison_subject("found", head, rows, left)
    page = Page(subject_page(subject))
    assert f"the lowest test loss is that of {HOSTILE}" in subject.sentence
    assert {"2.2500 *", "2.5000", "diverged", "-0.2500", "0.04", "qsvd compare m d --out DIR"} <= set(page.texts)
    assert "lora, 1 diverged" in page.texts
    assert "has no components" in page.texts
    assert page.all("img") == []
    assert len(page.all("script")) == 1


def test_a_comparison_whose_results_are_damaged_is_refused(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"kind": "comparison", "model": "m"}\n')
    with pytest.raises(BadInput, match=r"results\.jsonl is damaged .* give the command of qsvd compare again"):
        subject_of(tmp_path)
