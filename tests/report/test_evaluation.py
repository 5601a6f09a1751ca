"""A table for people and a document for programs of the same measurements."""

import json

import pytest
from rich.console import Console

from qsvd.report.evaluation import FORMS, ModelScores, evaluation_json, evaluation_table

SPLIT = ModelScores("out", "split", {"perplexity": 3.82871, "nats": 1.34253, "tokens": 20416, "kl_95": 0.25})
TRAINED = ModelScores("run", "trained", {"perplexity": 3.5, "nats": 1.25276, "tokens": 20416, "accuracy": 0.91234})


def rows_of(*measured):
    """First cell -> the other cells, as printed in 200 columns."""
    console = Console(width=200, record=True, file=None, quiet=False)
    with console.capture() as shown:
        console.print(evaluation_table(measured, "task perplexity"))
    lines = [line for line in shown.get().splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    return shown.get(), {first: rest for first, *rest in cells}


def test_each_model_is_a_column_and_each_value_a_row():
    shown, rows = rows_of(SPLIT, TRAINED)
    assert shown.splitlines()[0].strip() == "task perplexity"
    assert all(word in shown for word in ("out", "quantized model", "run"))
    assert rows["perplexity"] == ["3.8287", "3.5000"]
    assert rows["loss (nats / token)"] == ["1.34253", "1.25276"]
    assert rows["predicted tokens"] == ["20,416", "20,416"]


def test_a_value_that_one_model_lacks_is_an_empty_cell_and_one_that_all_lack_no_row():
    _, rows = rows_of(SPLIT, TRAINED)
    assert rows["accuracy"] == ["", "91.23%"]
    assert set(rows) == {"perplexity", "loss (nats / token)", "predicted tokens", "accuracy"}


def test_rows_are_in_the_order_of_the_forms():
    _, rows = rows_of(ModelScores("m", "16-bit", dict.fromkeys(reversed(FORMS), 0.5)))
    assert list(rows) == [heading for heading, _ in FORMS.values()]


@pytest.mark.parametrize(
    ("name", "value", "cell"),
    [
        ("kl_mean", 0.0461964, "0.046196"),
        ("kl_99", 0.343642, "0.34364"),
        ("top_token_agreement", 0.893912, "89.39%"),
        ("exact_match", 0.5, "50.00%"),
        ("label_nats", 0.6925861, "0.69259"),
        ("correct", 1234, "1,234"),
        ("window", 2048, "2,048"),
        ("perplexity", float("inf"), "inf"),
    ],
)
def test_a_value_has_the_digits_that_it_needs(name, value, cell):
    _, rows = rows_of(ModelScores("m", "16-bit", {name: value}))
    assert rows == {FORMS[name][0]: [cell]}


def test_json_has_every_value_as_it_was_measured_and_how():
    document = json.loads(json.dumps(evaluation_json([SPLIT, TRAINED], {"task": "perplexity", "reference": None})))
    assert document["how"] == {"task": "perplexity", "reference": None}
    assert document["models"] == [
        {"model": "out", "kind": "split"} | dict(SPLIT.values),
        {"model": "run", "kind": "trained"} | dict(TRAINED.values),
    ]
