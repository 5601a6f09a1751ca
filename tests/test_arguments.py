"""Other tools' names of options on a command line and in a file; tests/test_mistakes.py has what cannot be used."""

import pytest

from qsvd.cli import COMMANDS, parse, run
from qsvd.option_types import marks_of

TRAIN = ["train", "OUT", "data.jsonl", "--out", "RUN"]


@pytest.fixture(scope="module")
def defaults():
    return parse(TRAIN)


@pytest.mark.parametrize(
    ("typed", "ours"),
    [
        ("--lr 1e-4", "--learning-rate 1e-4"),
        ("--lora-r 8", "--rank 8"),
        ("--lora_r=8", "--rank 8"),
        ("--lora-alpha 32", "--alpha 32"),
        ("--num-train-epochs 2", "--epochs 2"),
        ("--max-steps 5", "--steps 5"),
        ("--per-device-train-batch-size 2", "--batch-size 2"),
        ("--per_device_train_batch_size 2", "--batch-size 2"),
        ("--gradient-accumulation-steps 3", "--accumulate 3"),
        ("--max-seq-length 96", "--max-length 96"),
        ("--bf16", "--dtype bfloat16"),
        ("--bf16 True", "--dtype bfloat16"),
        ("--method qlora", "--method lora"),
        ("--method qpissa", "--method pissa"),
        ("--packing true", "--packing"),
        ("--packing False", "--no-packing"),
        ("--no-gradient-checkpointing", "--gradient-checkpointing no"),
        ("--gradient-checkpointing", "--gradient-checkpointing yes"),
        ("--gradient-checkpointing False", "--gradient-checkpointing no"),
        ("--use-gradient-checkpointing unsloth", "--gradient-checkpointing yes"),
        ("--activation-offload", "--activation-offload yes"),
        ("--warmup-ratio 0.1", "--warmup 0.1"),
        ("--save-steps 7", "--save-every 7"),
    ],
)
def test_another_tools_name_is_ours(typed, ours, defaults):
    found = parse([*TRAIN, *typed.split()])
    assert found == parse([*TRAIN, *ours.split()])
    assert (found != defaults) == (typed not in ("--packing False",)), "the option has an effect"


def test_the_output_has_its_short_and_its_long_other_name():
    expected = parse(TRAIN)
    assert parse([*TRAIN[:3], "-o", "RUN"]) == parse([*TRAIN[:3], "--output-dir", "RUN"]) == expected
    assert parse(["train", "--out", "RUN", "OUT", "data.jsonl"]) == expected, "options may come first"


def test_samples_are_examples_where_there_are_examples_and_a_limit_elsewhere():
    assert parse(["calibrate", "m", "d", "--out", "s", "--samples", "9"]).examples == 9
    assert parse(["eval", "m", "--data", "d", "--samples", "9"]).limit == 9


def test_a_file_of_options_may_have_other_tools_names(tmp_path):
    lines = "lora_r: 8\nlr: 2e-5\nbf16: true\nmethod: qlora\nmax_seq_length: 96\ngradient_checkpointing: true\n"
    (tmp_path / "run.yaml").write_text(lines)
    words = "--rank 8 --lr 2e-5 --dtype bfloat16 --method lora --max-length 96 --gradient-checkpointing"
    expected = parse([*TRAIN, *words.split()])
    assert parse([*TRAIN, "--config", str(tmp_path / "run.yaml")]) == expected


@pytest.mark.parametrize(
    ("file", "words", "expected"),
    [
        ("model: OUT", "data.jsonl", "OUT data.jsonl"),
        ("data: data.jsonl", "OUT", "OUT data.jsonl"),
        ("model: OUT", "other data.jsonl", "other data.jsonl"),
        ("model: OUT\ndata: data.jsonl", "", "OUT data.jsonl"),
        ("model: OUT\ndata: data.jsonl", "other", "other data.jsonl"),
    ],
)
@pytest.mark.parametrize("command", ["train --out RUN", "plan"])
def test_the_command_line_gives_what_a_file_lacks(tmp_path, command, file, words, expected):
    (tmp_path / "run.yaml").write_text(f"{file}\nmax_length: 96")
    found = parse([*command.split(), "--config", str(tmp_path / "run.yaml"), *words.split()])
    assert found == parse([*command.split(), *expected.split(), "--max-length", "96"])


def test_words_replace_all_models_of_a_file(tmp_path):
    (tmp_path / "run.yaml").write_text("models: [A, B]\ndata: D")
    assert parse(["eval", "--config", str(tmp_path / "run.yaml")]).models == ("A", "B")
    assert parse(["eval", "--config", str(tmp_path / "run.yaml"), "C", "D", "E"]).models == ("C", "D", "E")


@pytest.mark.parametrize(
    ("file", "sentence"),
    [("modle: OUT", "unknown option 'modle' (did you mean model?)"), ("model: A\nbase: B", "'base' is given twice")],
)
def test_a_wrong_name_of_the_model_in_a_file_is_refused(tmp_path, capsys, file, sentence):
    (tmp_path / "run.yaml").write_text(file)
    assert run(["train", "data.jsonl", "--out", "RUN", "--config", str(tmp_path / "run.yaml")]) == 2
    assert sentence in capsys.readouterr().err


def test_no_other_tools_name_hides_an_option_of_ours():
    from qsvd.inputs.other_names import NAMES

    ours = {name.replace("_", "-") for record in COMMANDS.values() for name in marks_of(record)}
    assert not ours & (NAMES.keys() - {"samples"})
