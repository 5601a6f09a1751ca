"""Other tools' names, near misses and wrong values on a command line; each gets one sentence and exit code 2."""

import pytest

from qsvd.cli import COMMANDS, parse, run
from qsvd.option_types import marks_of

TRAIN = ["train", "OUT", "data.jsonl", "--out", "RUN"]


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
        ("--no-gradient-checkpointing", "--gradient-checkpointing false"),
        ("--warmup-ratio 0.1", "--warmup 0.1"),
        ("--save-steps 7", "--save-every 7"),
    ],
)
def test_another_tools_name_is_ours(typed, ours):
    found = parse([*TRAIN, *typed.split()])
    assert found == parse([*TRAIN, *ours.split()])
    assert (found != parse(TRAIN)) == (typed not in ("--packing False",)), "the option has an effect"


def test_the_output_has_its_short_and_its_long_other_name():
    expected = parse(TRAIN)
    assert parse([*TRAIN[:3], "-o", "RUN"]) == parse([*TRAIN[:3], "--output-dir", "RUN"]) == expected
    assert parse(["train", "--out", "RUN", "OUT", "data.jsonl"]) == expected, "options may come first"


def test_samples_are_examples_where_there_are_examples_and_a_limit_elsewhere():
    assert parse(["calibrate", "m", "d", "--out", "s", "--samples", "9"]).examples == 9
    assert parse(["eval", "m", "--data", "d", "--samples", "9"]).limit == 9


def test_a_file_of_options_may_have_other_tools_names(tmp_path):
    (tmp_path / "run.yaml").write_text("lora_r: 8\nlr: 2e-5\nbf16: true\nmethod: qlora\nmax_seq_length: 96\n")
    expected = parse(
        [*TRAIN, *["--rank", "8", "--lr", "2e-5", "--dtype", "bfloat16", "--method", "lora", "--max-length", "96"]]
    )
    assert parse([*TRAIN, "--config", str(tmp_path / "run.yaml")]) == expected


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            "train O D --out R --lerning-rate 1",
            "has no option --lerning-rate (did you mean --learning-rate?)",
        ),
        ("train O D --out R --lerning-rate 1 --stesp 2", "--stesp (did you mean --steps?)"),
        ("eval M --data D --limt 3", "qsvd eval has no option --limt (did you mean --limit?)"),
        ("eval M --data D --epochs 3", "qsvd eval has no option --epochs"),
        ("train O D", "qsvd train needs --out RUN (folder for checkpoints, adapter and summary)"),
        ("quantize", "qsvd quantize needs MODEL (folder of a 16-bit model, or a Hub id), --out OUT (output folder)"),
        ("train O D --out", "--out needs a value: --out RUN"),
        ("train O D --out R --steps --rank 3", "--steps needs a value"),
        (
            "train O D --out R --steps many --rank 2.5",
            "--steps 'many' is not a whole number; --rank '2.5' is not a whole",
        ),
        ("train O D --out R --lr high", "--learning-rate 'high' is not a number"),
        (
            "train O D --out R --method pisa",
            "'pisa' is not one of auto, pissa, lora, edora (did you mean pissa?)",
        ),
        ("train O D --out R --resident most", "--resident 'most' is not one of auto and is not a number"),
        ("quantize M extra --out O", "qsvd quantize takes MODEL, and 'extra' is one argument too many"),
        ("plan M --for trian", "is not one of auto, all, quantize, train, serve (did you mean train?)"),
        ("quantize M --out O --ranks 8", "qsvd quantize has no option --ranks (did you mean --rank?)"),
        ("export R --out O --to gguf", "--to 'gguf' is not one of peft, lora, merged"),
    ],
)
def test_a_mistake_gets_one_sentence_that_names_the_remedy(capsys, arguments, sentence):
    words = arguments.split()
    assert run(words) == 2
    shown = capsys.readouterr()
    assert sentence in shown.err
    assert shown.err.endswith(f"; see qsvd {words[0]} --help\n")
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_a_misspelt_command_gets_the_nearest_one(capsys):
    with pytest.raises(SystemExit):
        run(["trian", "O"])
    assert "there is no command 'trian' (did you mean train?)" in capsys.readouterr().err


def test_no_other_tools_name_hides_an_option_of_ours():
    from qsvd.arguments import NAMES

    ours = {name.replace("_", "-") for record in COMMANDS.values() for name in marks_of(record)}
    assert not ours & (NAMES.keys() - {"samples"})
