"""`qsvd train` from its flags to its folder: what is refused, shown, measured and kept."""

import json
import math
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import qsvd
import qsvd.commands.train
from qsvd.adapters.methods.lora import Lora
from qsvd.adapters.methods.table import METHODS
from qsvd.cli import parse, run
from qsvd.commands.train import train
from qsvd.data.examples import Home, read_run_data
from qsvd.errors import BadInput, Damaged
from qsvd.files.split_folder import open_split
from qsvd.prepare.train import prepare_train
from qsvd.training.run_folder import RunFolder
from tests.commands.folders import files_of, without_progress
from tests.runs import (
    TEXTS,
    TRAINED,
    interrupting,
    labelled_rows,
    outcome,
    steps_of,
    text_rows,
    training,
    words,
    write_rows,
)
from tests.sealed import without_digests

FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "checkpoint-4",
    "qsvd_adapter.json",
    TRAINED,
    "report.html",
    "run.json",
    "start.json",
    "steps.jsonl",
    "summary.json",
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("texts") / "texts.jsonl", text_rows())


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("labelled") / "labelled.jsonl", labelled_rows())


@pytest.fixture
def options(language, texts, tmp_path):
    return training(language, texts, tmp_path / "run")


@pytest.fixture(scope="module")
def complete(language, texts, tmp_path_factory):
    """A run that nobody disturbed, with a fifth held out."""
    out = tmp_path_factory.mktemp("complete") / "run"
    made = training(language, texts, out, held_out=0.2)
    train(made)
    return made


def data_of(options):
    """The data that a run has, without the plan of the run."""
    split = open_split(Path(options.base))
    return read_run_data(options, Home(str(options.base), split.folder, split.manifest["source"]["architecture"]))


def refused(options, sentence):
    """The command refuses these options with this sentence, code 2, and leaves no folder."""
    with pytest.raises(ValueError, match=sentence):
        train(options)
    assert not options.out.exists()


# What is refused before anything is written


@pytest.mark.parametrize(
    ("changes", "sentences"),
    [
        (
            {"rank": 0, "batch_size": 0, "accumulate": -1, "save_every": 0, "keep": 0, "max_length": 1},
            "a rank of 0 trains nothing: for QLoRA give --method lora, whose quantized model has rank 0; "
            "--rank 0 is below 1; --batch-size 0 is neither auto nor a number of at least 1; "
            "--accumulate -1 is below 1; --save-every 0 is below 1; "
            "--keep 0 is below 1; --max-length 1 is below 2",
        ),
        (
            {"alpha": 0.0, "learning_rate": math.nan, "epochs": math.inf, "steps": 0},
            "--alpha 0.0 is not a finite number above 0; --learning-rate nan is not a finite number above 0; --epochs "
            "inf is not a finite number above 0; --steps 0 is below 1",
        ),
        (
            {"weight_decay": -0.1, "max_grad_norm": math.nan, "warmup": 1.0, "held_out": -0.1, "seed": 2**32},
            "--weight-decay -0.1 is not a finite number of at least 0; --max-grad-norm nan is not a finite number of "
            "at least 0; --warmup 1.0 is not a number from 0 to below 1; --held-out -0.1 is not a number from 0 to "
            "below 1; --seed 4294967296 is outside 0..4294967295",
        ),
        (
            {"report_to": ("mlflow", "trackio"), "seed": -1},
            "--seed -1 is outside 0..4294967295; --report-to mlflow is none of tensorboard, wandb, trackio; "
            "--report-to trackio needs the package trackio, which is not installed (pip install trackio)",
        ),
    ],
)
def test_everything_that_is_out_of_range_is_named_at_once(options, monkeypatch, changes, sentences):
    monkeypatch.setattr("qsvd.options.conflicts.find_spec", lambda _: None)
    with pytest.raises(BadInput) as refusal:
        train(replace(options, **changes))
    assert sorted(str(refusal.value).split("; ")) == sorted(sentences.split("; "))
    assert not options.out.exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"map": ("text=", "=b", "a=b")}, r"^--map text= =b is not COLUMN=NAME"),
        ({"map": ("text=body",)}, r"^--map: body is not a name of qsvd"),
        ({"device": "cuda:99"}, r"^--device 'cuda:99' does not exist: torch finds \d+ CUDA GPUs$"),
        ({"alpha": 3.0}, r"alpha 3 would scale the stored components"),
        ({"method": "edora", "rank": 17}, r"rank 17 is outside 1\.\.16"),
        ({"valid": "no/such/file.jsonl"}, r"^no such file or folder: no/such/file\.jsonl$"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_refused_in_a_sentence(options, changes, sentence):
    refused(replace(options, **changes), sentence)


@pytest.mark.parametrize("method", ["pissa", "edora"])
def test_components_that_are_not_there_are_missed_before_the_data_is_read(options, plain, method, tmp_path):
    unreadable = tmp_path / "unreadable.jsonl"
    unreadable.write_text("{")
    sentence = r"the quantized model has none \(rank 0\); quantize with --rank above 0, or use --method lora$"
    refused(replace(options, base=plain, method=method, data=str(unreadable)), sentence)


@pytest.mark.parametrize(
    ("changes", "flags"),
    [({"packing": True}, "--packing"), ({"packing": True, "activation_offload": "yes"}, "--packing")],
)
def test_a_classifier_takes_no_flags_of_language_models(options, bert, labelled, changes, flags):
    changed = replace(options, base=bert, data=labelled, **changes)
    if changed.activation_offload == "yes":
        refused(changed, "--activation-offload yes needs a GPU")
    else:
        refused(
            changed, rf"holds labelled texts, which train a classifier; {flags} can be used for language models only$"
        )


def test_a_length_beyond_the_positions_of_the_model_is_refused(options, tmp_path):
    long = write_rows(tmp_path / "long.jsonl", [{"text": " ".join(TEXTS)}, {"text": TEXTS[0]}])
    refused(replace(options, data=long, max_length=513), "--max-length 513 is above 512, the context length of .*out$")
    assert prepare_train(replace(options, data=long, max_length=512))


def test_texts_with_labels_do_not_silently_make_a_classifier_of_a_language_model(options, bert, labelled):
    asked = r"labelled\.jsonl has the columns text and label, and .* is a language model: give --task classification to"
    refused(replace(options, data=labelled), asked)
    made = prepare_train(replace(options, data=labelled, task="classification"))
    assert made.data.train.label_names == made.record.labels == ("a", "b")
    alone = write_rows(options.out.parent / "alone.jsonl", [{"text": row["text"]} for row in labelled_rows()])
    as_texts = data_of(replace(options, data=labelled, task="causal")).train
    assert as_texts.input_ids == data_of(replace(options, data=alone)).train.input_ids
    assert as_texts.label_names == ()
    needs = r"--task classification needs the columns text and label; .*texts\.jsonl holds text examples$"
    refused(replace(options, task="classification"), needs)
    refused(replace(options, base=bert), r"is a BertModel, which does not predict tokens: it can only be trained")
    assert data_of(replace(options, base=bert, data=labelled)).train.label_names == ("a", "b")


@pytest.mark.parametrize(
    ("changes", "alpha"), [({}, None), ({"rank": 8}, 2.0), ({"rank": 8, "alpha": 16.0}, 16.0), ({"rslora": True}, 2.0)]
)
def test_a_run_of_version_0_1_goes_on_only_if_lora_has_the_scale_that_it_had_there(options, changes, alpha):
    """Its alpha was 16 at every rank and was written as null: now the same only at rank 64."""
    assert prepare_train(replace(options, method="lora", **changes)).identity["alpha"] == alpha


def test_held_out_examples_of_another_kind_are_refused(options, labelled):
    refused(replace(options, valid=labelled), r"labelled\.jsonl holds labelled examples, .*texts\.jsonl text$")


def test_a_base_without_a_tokenizer_is_refused(options, language, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(language, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(Damaged, match=r"bare lacks tokenizer.json, tokenizer_config.json, which"):
        train(replace(options, base=bare))
    without_digests(bare)
    refused(replace(options, base=bare), r"bare has no tokenizer that transformers can open; copy the tokenizer files")


# What is only shown


def test_a_preview_shows_the_first_example_and_writes_nothing(options, capsys):
    assert run(words(replace(options, preview=True))) == 0
    shown = capsys.readouterr()
    assert parse(shlex.split(shown.err.removeprefix("Next: "))[1:]) == replace(options, preview=False)
    assert re.match(r".*texts\.jsonl, line 1: \d+ tokens, \d+ trained \(\d+%\)\n", shown.out)
    assert f"[[<|bos|>{TEXTS[0][:40]}" in shown.out
    assert not options.out.exists()


def test_a_dry_run_prints_every_setting_and_writes_nothing(options, capsys):
    assert run(words(replace(options, dry_run=True, steps=None, epochs=1.5, held_out=0.2))) == 0
    shown = capsys.readouterr()
    assert shown.err.startswith("Next: qsvd train ")
    lines = [line.split("│") for line in shown.out.splitlines() if line.startswith("│")]
    found = {cells[1].strip(): cells[2].strip() for cells in lines}
    assert found["learning-rate"] == "2e-05"
    assert found["optimizer"] == "adamw"
    assert (found["method"], found["adapter dtype"], found["device"]) == ("pissa", "float32", "cpu, torch.float32")
    total = len(prepare_train(replace(options, held_out=0.0)).data.train.input_ids)
    held_out = round(0.2 * total)
    assert found["held out"] == f"{held_out} sequences"
    assert found["sequences"].startswith(f"{total - held_out} with ")
    assert not options.out.exists()


@pytest.mark.parametrize(("epochs", "accumulate"), [(0.3, 1), (1.01, 4)])
def test_the_steps_of_a_dry_run_are_those_of_the_run(options, tmp_path, capsys, epochs, accumulate):
    data = write_rows(tmp_path / "few.jsonl", text_rows()[:4])  # batches that no step divides
    changed = replace(options, data=data, steps=None, epochs=epochs, accumulate=accumulate, max_length=16)
    assert run(words(replace(changed, dry_run=True))) == 0
    told = int(re.search(r"│ steps +│ (\d+) ", capsys.readouterr().out)[1])
    train(changed)
    assert len(steps_of(options.out)) == told


def test_examples_that_are_cut_are_counted(options, tmp_path, capsys):
    pairs = [{"prompt": text * 3, "completion": text} for text in TEXTS[:3]]
    data = write_rows(tmp_path / "pairs.jsonl", [*pairs, {"prompt": TEXTS[3][:30], "completion": TEXTS[3][30:60]}])
    assert run(words(replace(options, data=data, steps=1))) == 0
    told = capsys.readouterr().err.splitlines()[1]
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    lengths = [len(tokenizer(f"{pair['prompt']}{pair['completion']}").input_ids) + 1 for pair in pairs]
    start = (
        r".*pairs\.jsonl: 3 examples were cut at 32 tokens \(--max-length\), 3 of them left out, since no trained token"
    )
    found = re.fullmatch(rf"{start} remained; (\d+) tokens are not used", told)
    assert int(found[1]) == pytest.approx(sum(lengths) - 3 * 32, abs=3)  # a pair may be divided where its parts meet


# What a run leaves and measures


def test_a_run_leaves_its_files_and_tells_its_numbers(complete, capsys):
    folder = complete.out
    assert {path.name for path in folder.iterdir()} == FILES
    summary = json.loads((folder / "summary.json").read_text())
    steps = steps_of(folder)
    assert (summary["steps"], summary["tokens"]) == (4, steps[-1]["tokens"])
    assert (summary["first_loss"], summary["last_loss"]) == (steps[0]["loss"], steps[-1]["loss"])
    assert summary["trained_parameters"] == 77_824
    assert summary["memory"]["trained parameters"] == 4 * 77_824
    assert summary["memory"]["optimizer state"] == pytest.approx(8 * 77_824, rel=0.01)
    assert (summary["method"], summary["optimizer"], summary["device"]) == ("pissa", "adamw", "cpu")
    assert run([*words(complete), "--resume"]) == 0
    shown = capsys.readouterr()
    assert without_progress(shown.err).endswith(f"\n{folder} was complete already\n")
    assert shown.out.endswith(f"\n{folder}\n")
    assert f"{summary['held_out_before']:.4f}, {summary['held_out_after']:.4f}" in shown.out
    assert f"{summary['first_step_seconds']:.1f} s after loading began" in shown.out


def test_the_code_of_the_readme_loads_the_run(complete):
    code, _ = re.findall(r"```python\n(.*?)```", (complete.out / "README.md").read_text(), flags=re.S)
    names: dict = {}
    exec(code, names)
    assert (complete.out / TRAINED).is_file()
    assert [p.shape for p in names["model"].parameters() if p.requires_grad]


def nats(model, sequences):
    """Mean of all tokens but the first of each sequence, one sequence at a time."""
    found = []
    for ids in sequences:
        with torch.no_grad():
            chances = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        found += [-chances[place, token].item() for place, token in enumerate(ids[1:])]
    return sum(found) / len(found)


def test_the_held_out_loss_is_that_of_the_model_before_and_after(complete):
    data = prepare_train(complete).data
    summary = json.loads((complete.out / "summary.json").read_text())
    held_out = data.held_out.input_ids
    assert not [ids for ids in held_out if ids in data.train.input_ids]
    before = nats(qsvd.load(complete.base, device="cpu"), held_out)
    after = nats(qsvd.load(complete.base, adapter=complete.out, device="cpu"), held_out)
    assert summary["held_out_before"] == pytest.approx(before, rel=1e-6)
    assert summary["held_out_after"] == pytest.approx(after, rel=1e-6)
    assert before != after


def test_what_is_held_out_is_a_share_a_folders_file_a_file_or_nothing(options, tmp_path):
    total = len(TEXTS)
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder / "train.jsonl", text_rows()[3:])
    write_rows(folder / "valid.jsonl", text_rows()[:3])
    other = write_rows(tmp_path / "other.jsonl", text_rows()[:2])

    def counts(**changes):
        data = data_of(replace(options, max_length=128, **changes))
        return len(data.train.input_ids), len(data.held_out.input_ids) if data.held_out else 0

    assert counts() == (total, 0)
    assert counts(held_out=0.5) == (total / 2, total / 2)
    assert counts(held_out=1e-9) == (total - 1, 1)
    assert counts(data=str(folder)) == counts(data=str(folder), held_out=0.5) == (total - 3, 3)
    assert counts(data=str(folder), split="valid") == (3, 0)
    assert counts(valid=other, held_out=0.5) == (total, 2)
    assert counts(valid=str(folder)) == (total, 3)
    one = write_rows(tmp_path / "one.jsonl", text_rows()[:1])
    assert counts(data=one, held_out=0.5) == (1, 0)


def test_at_most_256_examples_are_held_out_and_the_seed_draws_them(options, tmp_path):
    data = write_rows(tmp_path / "many.jsonl", [{"text": f"number {number}"} for number in range(1000)])
    read = [data_of(replace(options, data=data, held_out=0.9, seed=seed)) for seed in (0, 0, 1)]
    drawn = [one.held_out.input_ids for one in read]
    assert [len(ids) for ids in drawn] == [256, 256, 256]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(read[0].train.input_ids) == 744


def test_a_classifier_learns_two_classes_and_counts_how_often_it_is_right(options, bert, tmp_path, capsys):
    rows = [{"text": text, "label": label} for text, label in [("good good", "yes"), ("bad bad", "no")] * 8]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    learning = {"steps": 16, "learning_rate": 2e-2, "method": "lora", "rank": 4, "alpha": 16.0, "valid": data}
    changed = replace(options, base=bert, data=data, batch_size=4, accumulate=1, **learning)
    assert run(words(changed)) == 0
    summary = json.loads((changed.out / "summary.json").read_text())
    assert summary["accuracy_before"] == 0.5  # it says the same of all
    assert summary["accuracy_after"] == 1.0
    assert summary["held_out_after"] < 0.5 * summary["held_out_before"]
    assert "50.00%, 100.00%" in capsys.readouterr().out
    model = qsvd.load(bert, adapter=changed.out, device="cpu")
    assert model.config.id2label == {0: "no", 1: "yes"}


def test_a_result_of_rank_0_is_trained_as_qlora(options, plain):
    assert prepare_train(replace(options, base=plain, rank=4)).record.method == "lora"


# Going on, or not


def test_a_folder_is_not_trained_in_twice_by_mistake(complete, options, tmp_path, capsys):
    before = files_of(complete.out)
    assert run(words(complete)) == 0
    assert "was complete already" in capsys.readouterr().err
    assert files_of(complete.out) == before
    assert run([*words(replace(complete, learning_rate=1e-3, warmup=0.5)), "--resume"]) == 2
    told = capsys.readouterr().err
    assert "was written with other options: learning_rate null there, 0.001 now; warmup 0.03 there, 0.5 now;" in told
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    assert run(words(replace(options, out=tmp_path / "full"))) == 2
    assert "is not empty and was not written by qsvd train" in capsys.readouterr().err


@pytest.mark.parametrize("rows", [text_rows()[1:], [*text_rows()[:-1], {"text": "other"}]])
def test_other_data_under_the_same_name_is_refused(complete, tmp_path, capsys, rows):
    data = write_rows(tmp_path / "texts.jsonl", rows)
    assert run([*words(replace(complete, data=data)), "--resume"]) == 2
    assert re.search(r"other options: the training data as tokens changed; ", capsys.readouterr().err)


def test_the_names_of_the_classes_are_part_of_the_data(options, bert, tmp_path):
    identities = []
    for names in ("ab", "xy"):
        rows = [{"text": row["text"], "label": names["ab".index(row["label"])]} for row in labelled_rows()]
        data = write_rows(tmp_path / f"{names}.jsonl", rows)
        identities.append(prepare_train(replace(options, base=bert, data=data)).identity)
    assert identities[0] != identities[1]


def test_base_and_data_may_move(complete, language, tmp_path, capsys):
    moved = tmp_path / "moved"
    (tmp_path / "data.jsonl").write_bytes(Path(complete.data).read_bytes())
    moved.symlink_to(language)
    changed = replace(complete, base=moved, data=str(tmp_path / "data.jsonl"), save_every=7, keep=1, any_start=True)
    assert run([*words(changed), "--resume"]) == 0
    assert without_progress(capsys.readouterr().err).endswith("was complete already\n")


def test_an_interrupt_in_the_last_step_is_too_late(options, monkeypatch, capsys):
    interrupting(monkeypatch, 1)
    assert run(words(replace(options, steps=1))) == 0
    assert "stopping after this step; press Ctrl-C again to stop at once" in capsys.readouterr().err
    assert (options.out / "summary.json").is_file()


def test_a_second_interrupt_stops_at_once(options, monkeypatch, capsys):
    interrupting(monkeypatch, 2, 2)
    options = replace(options, save_every=1, steps=3, accumulate=1)
    assert run(words(options)) == 130
    assert capsys.readouterr().err.endswith("qsvd: interrupted\n")
    assert [path.name for path in options.out.glob("checkpoint-*")] == ["checkpoint-1"]
    monkeypatch.undo()
    assert run([*words(options), "--resume"]) == 0
    assert len(steps_of(options.out)) == 3


def test_two_processes_do_not_train_in_one_folder(options, capsys):
    with RunFolder(options.out, prepare_train(options).identity, resume=False, total=9):
        assert run([*words(options), "--resume"]) == 2
    assert "another qsvd process is writing to" in capsys.readouterr().err


# Runs that end themselves


class Off(Lora):
    """Starts somewhere else than the base."""

    @classmethod
    def start(cls, principal, options, generator):
        made = super().start(principal, options, generator)
        made.up.data.normal_(std=options.alpha, generator=generator)
        return made


@pytest.mark.parametrize(
    ("alpha", "sentence"),
    [
        (4.0, "the adapter does not start from its outputs"),
        (12.0, "the loss of guessing among 4096; the quantized model without the adapter has 5."),
    ],
)
def test_a_method_that_starts_elsewhere_is_stopped_unless_told_otherwise(options, monkeypatch, capsys, alpha, sentence):
    monkeypatch.setitem(METHODS, "lora", Off)
    changed = replace(options, method="lora", alpha=alpha, steps=1)
    assert run(words(changed)) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("qsvd: the first loss is ")
    assert sentence in told
    if alpha == 4.0:
        assert run([*words(replace(changed, any_start=True)), "--resume"]) == 0
        assert len(steps_of(options.out)) == 1


def test_a_tokenizer_of_another_model_is_noticed(options, language, tmp_path, capsys):
    wrong = tmp_path / "wrong"
    without_digests(shutil.copytree(language, wrong))
    tokenizer = json.loads((wrong / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    last, special = len(vocabulary) - 1, {token["id"] for token in tokenizer["added_tokens"]}
    free = sorted(number for number in range(last + 1) if number not in special)
    other = dict(zip(free, reversed(free), strict=True))
    tokenizer["model"]["vocab"] = {piece: other.get(number, number) for piece, number in vocabulary.items()}
    (wrong / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert run(words(replace(options, base=wrong, steps=1))) == 1
    told = capsys.readouterr().err
    assert (
        "higher than 8.318, the loss of guessing among 4096; the quantized model without the adapter is no better"
        in told
    )


def test_tokens_that_the_model_does_not_know_are_refused_with_their_example(options, language, tmp_path):
    base = without_digests(shutil.copytree(language, tmp_path / "base"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(base)
    data = write_rows(tmp_path / "t.jsonl", [*text_rows()[:2], {"text": "a <|im_start|>"}])
    refused(
        replace(options, base=str(base), data=data, held_out=0.0),
        rf"^1 tokens are outside 0..4095, the vocabulary of {base}: 4096 \(<\|im_start\|>, {data}, line 3\); put ",
    )


def test_a_rate_that_is_absurd_ends_with_1_and_keeps_what_was_saved(options, capsys):
    assert run(words(replace(options, learning_rate=1e30, warmup=0.0, accumulate=1, save_every=1, keep=9))) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    found = re.fullmatch(
        r"qsvd: the (loss|gradient norm) of step (\d) is (NaN|inf); the last good checkpoint is checkpoint-(\d)\. "
        r"Lower --learning-rate, raise --warmup, or check the data near this step",
        told,
    )
    assert int(found[2]) == int(found[4]) + 1
    assert (options.out / f"checkpoint-{found[4]}" / TRAINED).is_file()
    assert not (options.out / "summary.json").exists()


def test_too_little_memory_ends_with_3_and_what_to_lower(options, monkeypatch, capsys):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB.\nand more lines")

    monkeypatch.setattr(qsvd.commands.train, "load_start", fail)
    assert run(words(replace(options, batch_size=8, max_length=64))) == 3
    told = without_progress(capsys.readouterr().err)
    assert "\nqsvd: out of memory: batch size 8 x 64 tokens; try --batch-size 4 " in told
    assert told.endswith("(Tried to allocate 2.00 GiB.)\n")


# A file of flags


def test_flags_come_from_a_file_too(options, tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text(
        f"base: {options.base}\ndata: {options.data}\nsteps: 4\nbatch-size: 2\naccumulate: 2\nmax_length: 32\n"
        "held_out: 0\nlearning_rate: 2e-5\nepochs: 3\nrank: 16\nalpha:\nvalid:\nreport_to: []\nmap: []\ndevice: cpu\n"
    )
    found = parse(["train", "--config", str(file), "--out", str(options.out)])
    assert found == replace(options, learning_rate=2e-5, epochs=3.0, rank=16)
    assert isinstance(found.epochs, float)
    assert isinstance(found.learning_rate, float)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("rank: 1.5", "rank is 1.5, not of type int"),
        ("epochs: many", "epochs is 'many', not of type float"),
        ("epochs: true", "epochs is True, not of type float"),
        ("learning_rate: [1]", "learning_rate is [1], not of type float"),
        ("valid: 3", "valid is 3, not of type str"),
        ("seed:", "seed is None, not of type int"),
    ],
)
def test_a_file_with_values_of_other_types_is_refused(tmp_path, capsys, line, sentence):
    file = tmp_path / "train.yaml"
    file.write_text(f"{line}\n")
    assert run(["train", "b", "d", "--out", "o", "--config", str(file)]) == 2
    assert capsys.readouterr().err == f"qsvd: --config {file}: {sentence}\n"


def test_the_command_line_of_these_tests_is_the_record(options):
    assert parse(words(options)) == options
    changed = replace(options, report_to=("wandb",), map=("a=b", "c=d"), packing=True, rank=3, resume=True)
    assert parse(words(changed)) == changed


def test_the_outcome_does_not_depend_on_how_often_it_is_saved(complete, tmp_path):
    often = outcome(train(replace(complete, out=tmp_path / "often", save_every=1, keep=1)))
    assert often == outcome(complete.out)
