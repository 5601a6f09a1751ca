"""The last lines of every command: what was written, its size, and commands that run as they are printed."""

import re
import shlex

import pytest
import torch

import qsvd
from qsvd.cli import parse, run
from qsvd.data.examples import first_lines
from qsvd.errors import show_size
from qsvd.prepare.check_options import check
from qsvd.prepare.quantize_first import prepare_training
from tests.runs import labelled_rows, text_rows, write_rows

MODEL, DATA = "a model", "some data.jsonl"  # names that a shell would divide
SHORT = [
    "--steps",
    "1",
    "--batch-size",
    "1",
    "--accumulate",
    "1",
    "--max-length",
    "32",
    "--any-start",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("home")
    (folder / MODEL).symlink_to(tiny.parent / "source")
    write_rows(folder / DATA, text_rows())
    write_rows(folder / "labels.jsonl", labelled_rows())
    return folder


@pytest.fixture
def last(home, monkeypatch, capsys):
    """Run a command in `home`: the last line of stdout, what is done, the words of the next commands."""
    monkeypatch.chdir(home)

    def do(*words):
        assert run([str(word) for word in words]) == 0
        said = capsys.readouterr()
        done = re.search(r"^Done: (.*?), [\w -]+, (\d\S* \w+)(?: in (\d+) files)?$", said.err, re.MULTILINE)
        place = home / done[1]
        files = [file for file in place.rglob("*") if file.is_file()] if place.is_dir() else [place]
        assert done[2] == show_size(sum(file.stat().st_size for file in files))
        assert int(done[3] or 1) == len(files)
        found = re.findall(r"^Next: (.*)$", said.err, re.M)
        return said.out.splitlines()[-1], done[1], [shlex.split(line, comments=True) for line in found]

    return do


def test_the_commands_after_each_command_run_as_printed(last):
    out, done, (train,) = last("quantize", MODEL, "--out", "an out", "--rank", 8, "--iterations", 1, "--device", "cpu")
    assert (out, done) == ("an out", "an out")
    assert last("report", "an out", "--worst", 1)[2] == [train]
    train = [DATA if word == "DATA" else word for word in train[1:]]
    out, done, (generate, export) = last(*train, *SHORT)
    assert (out, done) == ("an out-run", "an out-run")
    assert run([*generate[1:], "--max-new-tokens", "1"]) == 0
    out, _, (generate,) = last(*export[1:])
    assert out == "an out-run-merged"
    assert run([*generate[1:], "--max-new-tokens", "1"]) == 0
    *_, (_, evaluate, _) = last("train", "an out", DATA, "--out", "r 2", *SHORT, "--valid", DATA)
    assert evaluate == ["qsvd", "eval", "an out", "r 2", "--data", DATA]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT asks for an old name
def test_the_line_after_an_export_for_peft_loads_what_was_trained(last, capsys):
    last("quantize", MODEL, "--out", "o", "--rank", 8, "--iterations", 1, "--device", "cpu")
    last("train", "o", DATA, "--out", "r", "--learning-rate", "0.1", "--warmup", "0", "--schedule", "constant", *SHORT)
    assert run(["export", "r", "--to", "peft", "--out", "e"]) == 0
    names = {}
    exec(re.search(r"^Next: \(Python\) (.*)$", capsys.readouterr().err, re.M)[1], names)
    tokens = torch.arange(3, 11)[None]
    with torch.no_grad():
        found = names["model"].eval()(input_ids=tokens).logits.float()
        wanted, before = (qsvd.load("o", adapter=run_, device="cpu")(input_ids=tokens).logits for run_ in ("r", None))
    assert (found - wanted).abs().max() < 0.2 * (wanted - before).abs().max()  # one decodes in bfloat16


def test_statistics_and_tables_are_followed_by_quantize(last):
    _, done, (quantize,) = last("calibrate", MODEL, DATA, "--out", "s 1.st", "--examples", 1, "--device", "cpu")
    assert done == "s 1.st"
    options = parse(quantize[1:])
    check(options)
    assert (str(options.statistics), options.objective, options.budget) == ("s 1.st", "fisher", "2.75bits")
    words = ("--out", "g 1.st", "--examples", 1, "--device", "cpu", "--gradient-rank", 2)
    _, _, (train, quantize) = last("calibrate", MODEL, DATA, *words)
    assert parse(quantize[1:]).objective == "fisher"
    assert last(*train[1:], "--device", "cpu", "--steps", 1, "--max-length", 16)[1] == "a model-run"
    some = ["--exclude", "*.mlp.*"]
    table = ["allocate", MODEL, "--budget", "6bits", "--out", "a 1.txt", "--ranks", 0, 8, "--device", "cpu", *some]
    _, done, (quantize,) = last(*table, "--codecs", "nf4-64-8x256")
    assert done == "a 1.txt"
    assert last(*quantize[1:], "--device", "cpu")[1] == "a model-quantized"


TRAINED = {
    DATA: r"causal language model on texts \(column text\), \d+ sequences and 1 held out, \d+ of \d+ tokens trained",
    "pairs.jsonl": r"causal language model on prompt/completion pairs \(columns question, answer; no chat template\), "
    r"2 examples, \d+ of \d+ tokens trained",
    "chats.jsonl": r"causal language model on conversations \(column messages; chat template zephyr\), 2 examples, "
    r"\d+ of \d+ tokens trained",
    "labels.jsonl": r"classifier of 2 classes on labelled texts \(columns text, label\), 14 examples, \d+ tokens",
}
MORE = {"chats.jsonl": ["--chat-template", "zephyr"], "labels.jsonl": ["--task", "classification"]}


@pytest.mark.parametrize("name", TRAINED)
def test_the_first_line_of_train_says_what_is_trained(home, last, capsys, name):
    write_rows(home / "pairs.jsonl", [{"question": "Why?", "answer": "So.", "id": 3}] * 2)
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    write_rows(home / "chats.jsonl", [{"messages": chat}] * 2)
    last("quantize", MODEL, "--out", "o", "--rank", 8, "--iterations", 1, "--device", "cpu")
    held = [] if name == DATA else ["--held-out", "0"]
    command = ["train", "o", name, "--out", f"run {name}", *SHORT, *held, *MORE.get(name, [])]
    options = parse(command)
    first = first_lines(options, prepare_training(options).data)[0]
    assert re.fullmatch(f"Training: {TRAINED[name]}", first), first
    if name == DATA:
        assert run(command) == 0
        assert capsys.readouterr().err.splitlines()[0] == first


def test_calibrate_says_which_examples_were_cut(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    long = {"prompt": "Why? " * 40, "completion": "So. " * 100}
    write_rows(home / "long.jsonl", [long, {"prompt": "A", "completion": "B"}])
    words = ["long.jsonl", "--out", "cut.st", "--examples", "1", "--max-length", "90", "--device", "cpu"]
    assert run(["calibrate", MODEL, *words]) == 0
    first = capsys.readouterr().err.splitlines()[0]
    assert re.fullmatch(
        r"long\.jsonl: 1 examples were cut at 90 tokens \(--max-length\); \d+ tokens are not used", first
    )
