"""Options of a method's own: on the command line, in a file, from Python, in the help and in the run."""

import json

import pytest

import qsvd
from qsvd.cli import parse, run
from tests.runs import text_rows, write_rows

LINE = ["train", "OUT", "DATA", "--out", "RUN"]


def test_the_options_of_a_method_are_taken_with_it_alone(capsys):
    assert parse([*LINE, "--method", "adalora", "--target-rank", "3", "--tinit", "0.2"]).target_rank == 3
    assert parse([*LINE, "--method=vera", "--d_initial", "0.5"]).d_initial == 0.5
    assert parse([*LINE, "--method", "qlora", "--lora-plus-ratio", "16"]).lora_plus_ratio == 16
    for words in ([], ["--method", "vera"], ["--method", "auto"]):
        assert run([*LINE, *words, "--target-rank", "3"]) == 2
        assert "--target-rank is an option of --method adalora: give both" in capsys.readouterr().err
    assert run([*LINE, "--method", "adalora", "--target-rank", "0"]) == 2
    assert "--target-rank 0 is below 1" in capsys.readouterr().err


def test_the_help_of_a_method_ends_with_its_options(capsys):
    for words, is_there in (([], False), (["--method", "adalora"], True)):
        with pytest.raises(SystemExit):
            parse(["train", *words, "--help"])
        assert ("--target-rank" in capsys.readouterr().out) == is_there


def test_a_file_of_options_has_them(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("method: sorsa\ngamma: 0.25\n", encoding="utf-8")
    assert parse([*LINE, "--config", str(file)]).gamma == 0.25


def test_a_run_keeps_them_and_another_value_is_another_run(language, tmp_path):
    base, data = language, write_rows(tmp_path / "texts.jsonl", text_rows())
    options = {"out": tmp_path / "run", "method": "vera", "rank": 4, "steps": 1, "device": "cpu", "held_out": 0.0}
    qsvd.train(str(base), data, d_initial=0.5, max_length=16, **options)
    assert json.loads((tmp_path / "run" / "qsvd_adapter.json").read_text())["own"] == {"d_initial": 0.5}
    assert qsvd.load(base, adapter=tmp_path / "run").split_record.own == {"d_initial": 0.5}
    with pytest.raises(qsvd.BadInput, match="d_initial"):
        qsvd.train(str(base), data, d_initial=0.25, max_length=16, **options)
