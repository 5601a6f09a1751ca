"""`qsvd report`: what is printed is what errors.jsonl holds."""

import json
import math

import pytest

import qsvd
from qsvd.cli import run
from qsvd.commands.report import load_report
from tests.checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("result")
    write_checkpoint(folder / "source")
    return qsvd.quantize(
        qsvd.Quantize(str(folder / "source"), out=folder / "out", rank=4, order="quantize", iterations=1)
    )


@pytest.fixture(scope="module")
def records(result):
    return [json.loads(line) for line in (result / "errors.jsonl").read_text().splitlines()]


def as_json(result, capsys, *flags):
    assert run(["report", str(result), "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_holds_every_record_as_it_is_stored(result, records, capsys):
    found = as_json(result, capsys)
    assert [
        {key: weight[key] for key in record} for weight, record in zip(found["weights"], records, strict=True)
    ] == records
    assert (found["rank"], found["order"], found["end"]) == (4, "quantize", "svd")


def test_the_total_adds_squares_of_errors_and_of_weights(result, records, capsys):
    whole = as_json(result, capsys)["totals"][-1]
    assert whole["role"] == "model"
    size = math.fsum(record["weight_frobenius"] ** 2 for record in records)
    for state in ("before", "after"):
        error = math.fsum(record[state]["frobenius"] ** 2 for record in records)
        assert whole[f"relative_{state}"] == pytest.approx(math.sqrt(error / size), rel=1e-12)


@pytest.mark.parametrize("count", [0, 3, 99])
def test_the_worst_weights_are_the_largest_relative_errors(result, records, capsys, count):
    worst = as_json(result, capsys, "--worst", str(count))["worst"]
    ratios = sorted((record["after"]["frobenius"] / record["weight_frobenius"] for record in records), reverse=True)
    assert [weight["relative_after"] for weight in worst] == pytest.approx(ratios[:count], rel=1e-12)


def test_the_table_names_as_many_weights_as_asked_for(result, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["report", str(result), "--worst", "2"]) == 0
    text = capsys.readouterr().out
    assert text.count("model.layers.") == 2 + 2  # and two patterns of norms that were left


def test_a_report_reads_back_the_header_that_was_written(result):
    header, errors = load_report(result)
    assert header.model == str(result.with_name("source"))
    assert header.coverage.weights == len(errors) == 14
    assert header.coverage.left[0].pattern in ("model.embed_tokens.weight", "lm_head.weight")
