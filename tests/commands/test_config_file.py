"""--config FILE.yaml: flags by name; what stands on the command line wins."""

from itertools import pairwise
from pathlib import Path

import pytest

from qsvd.cli import parse, run
from qsvd.errors import BadInput
from qsvd.options import Quantize, Report

LAUGHS = "a: &a [x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in pairwise("abcdefgh"))


@pytest.fixture
def config(tmp_path):
    def write(text):
        file = tmp_path / "run.yaml"
        file.write_text(text)
        return str(file)

    return write


def test_a_file_gives_flags_and_the_command_line_wins(config):
    file = config(
        "model: some/model\nout: there\nrank: 8\ninclude: ['*.q', '*.k']\ndouble-quant: false\nshard_size: 1GB\n"
    )
    expected = {"include": ("*.q", "*.k"), "double_quant": False, "shard_size": "1GB"}
    assert parse(["quantize", "--config", file]) == Quantize("some/model", out=Path("there"), rank=8, **expected)
    found = parse(["quantize", "other", "--rank", "16", "--config", file, "--out", "here"])
    assert found == Quantize("other", out=Path("here"), rank=16, **expected)


@pytest.mark.parametrize("arguments", [["--config=FILE", "quantize"], ["quantize", "--config=FILE"]])
def test_the_file_may_come_anywhere_and_after_an_equals_sign(config, arguments):
    file = config("model: m\nout: there\nexclude: '*.q'\n")
    words = [word.replace("FILE", file) for word in arguments]
    assert parse(words) == Quantize("m", out=Path("there"), exclude=("*.q",))


def test_what_the_file_lacks_must_be_given(config):
    file = config("rank: 8\n")
    assert parse(["quantize", "m", "--out", "o", "--config", file]).rank == 8
    with pytest.raises(BadInput, match="qsvd quantize needs --out OUT"):
        parse(["quantize", "m", "--config", file])


def test_an_alias_is_what_it_stands_for(config):
    found = parse(["quantize", "m", "--config", config("out: o\ninclude: &a ['*.q']\nexclude: *a\n")])
    assert found.include == found.exclude == ("*.q",)


def test_another_command_takes_a_file_too(config):
    assert parse(["report", "there", "--config", config("worst: 3\njson: true\n")]) == Report(
        (Path("there"),), json=True, worst=3
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("rank: 'eight'\n", "rank is 'eight', not of type int"),
        ("rank: 8.0\n", "rank is 8.0, not of type int"),
        ("rank: true\n", "rank is True, not of type int"),
        ("rank:\n", "rank is None, not of type int"),
        ("double_quant: 1\n", "double_quant is 1, not of type bool"),
        ("dtype: int8\n", "dtype is 'int8', not one of bfloat16, float16, float32"),
        ("order: [svd]\n", "order is ['svd'], not one of svd, quantize"),
        ("include: [3]\n", "include is 3, not of type str"),
        ("out: 3\n", "out is 3, not of type str"),
        ("ranks: 8\n", "unknown option 'ranks' (did you mean rank?)"),
        ("zzz: 8\n", "unknown option 'zzz' (known: model, out, rank, expert_rank, quality, iterations, "),
        ("- rank\n", "must hold `name: value` lines"),
        ("", "must hold `name: value` lines"),
        ("rank: [8\n", "is not valid YAML: while parsing a flow sequence"),
        ("rank: 8\n  out: x\n", "is not valid YAML: "),
        ("rank: 8\nrank: 9\n", "line 1, column 1: rank is there twice"),
        ("include: [{a: 1, a: 2}]\n", "line 1, column 11: a is there twice"),
        ("rank: !!int 8\n", "line 1, column 7: the tag tag:yaml.org,2002:int is not read"),
        ("out: !!python/name:os.system\n", "the tag tag:yaml.org,2002:python/name:os.system is not read"),
        (LAUGHS, "more than 100,000 values"),
        ("out: &a [*a]\n", "an alias without an end"),
        (f"out: {'[' * 30}", "line 1, column 25: more than 20 values within each other"),
        (f"out: {'x' * 10**6}", "it has more than 1,000,000 bytes"),
        ("out: 2020-99-99\n", "is not valid YAML: month must be in 1..12"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_reason(config, capsys, text, sentence):
    file = config(text)
    assert run(["quantize", "m", "--out", "o", "--config", file]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"qsvd: --config {file}")
    assert shown.count("\n") == 1
    assert sentence in shown


def test_all_faults_of_a_file_are_named_at_once(config, capsys):
    assert run(["quantize", "--config", config("rank: x\nsize: 1\ndtype: y\n")]) == 2
    shown = capsys.readouterr().err
    assert "unknown option 'size'" in shown
    assert "rank is 'x', not of type int" in shown
    assert "dtype is 'y', not one of" in shown


def test_a_file_that_is_not_there(tmp_path, capsys):
    assert run(["quantize", "m", "--out", "o", "--config", str(tmp_path / "no.yaml")]) == 2
    assert capsys.readouterr().err == f"qsvd: --config {tmp_path / 'no.yaml'}: no such file\n"


def test_no_file_after_the_flag(capsys):
    assert run(["quantize", "m", "--out", "o", "--config"]) == 2
    assert capsys.readouterr().err == "qsvd: --config needs a YAML file after it\n"


def test_a_folder_instead_of_a_file_is_bad_input(tmp_path, capsys):
    assert run(["quantize", "m", "--out", "o", "--config", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"qsvd: --config {tmp_path}")
    assert "finished work is kept" not in shown


def test_a_file_that_is_no_text_is_named(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_bytes(b"rank: \xff\xfe\n")
    assert run(["quantize", "m", "--out", "o", "--config", str(file)]) == 2
    assert capsys.readouterr().err.startswith(f"qsvd: --config {file}")


def test_an_empty_value_does_not_swallow_the_next_argument(capsys):
    assert run(["quantize", "--config=", "m", "--out", "o"]) == 2
    assert capsys.readouterr().err == "qsvd: --config needs a YAML file after it\n"
