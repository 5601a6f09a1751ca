"""Small bases, data and settings for tests of training.

The language model is the embedded one without its last three layers: 256 wide, so that rank 16 gives matrices of 4096
and more elements, of which bitsandbytes' 8-bit optimizers keep 8-bit state.
"""

import json
import shutil
import signal
from functools import cache
from pathlib import Path

import safetensors.torch
import torch
from transformers import AutoTokenizer

import qsvd
from qsvd.adapters.methods.table import with_options
from qsvd.commands.demo import FINE_TUNING, MODEL
from qsvd.data.columns import UNTRAINED, Tokenized
from qsvd.data.row_files import Places
from qsvd.data.tokens import pack, packed_dataset
from qsvd.options import Train
from qsvd.training.run_folder import RunFolder
from qsvd.training.settings import Settings
from qsvd.training.trainer import make_trainer
from tests.checkpoints import write_checkpoint, write_tokenizer

RANK = 16
BERT = {"vocab_size": 4096, "hidden_size": 64, "pad_token_id": 2}  # of the embedded model's tokenizer
TEXTS = [line[:160] for line in FINE_TUNING.read_text(encoding="utf-8").splitlines() if len(line) > 40][:14]
TRAINED = "qsvd_adapter.safetensors"
CHANGING = ("seconds", "peak_bytes", "qsvd_digest")  # from run to run


def language_base(folder, *, rank=RANK):
    """folder/out, a result of `qsvd quantize`, with its source beside it; made if it is not there."""
    source, out = folder / "source", folder / "out"
    if (out / "qsvd.json").exists():
        return out
    return qsvd.quantize(
        qsvd.Quantize(str(language_source(source)), out=out, rank=rank, iterations=1, device="cpu")
    ).path


def language_source(source):
    """The 16-bit model of language_base."""
    source.mkdir(parents=True)
    for path in MODEL.glob("*.json"):
        shutil.copyfile(path, source / path.name)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    tensors = safetensors.torch.load_file(MODEL / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers." not in name or ".layers.0." in name}
    safetensors.torch.save_file(kept, source / "model.safetensors", metadata={"format": "pt"})
    return source


def classifier_base(folder, *, architecture="BertModel", **changes):
    """As language_base: a tiny random model, with the tokenizer of the embedded one; a BERT with dropout."""
    source, out = folder / "source", folder / "out"
    if (out / "qsvd.json").exists():
        return out
    write_checkpoint(source, architecture, **((BERT if architecture == "BertModel" else {}) | changes))
    write_tokenizer(source)
    return qsvd.quantize(qsvd.Quantize(str(source), out=out, rank=4, iterations=1, device="cpu")).path


def write_rows(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def text_rows():
    return [{"text": text} for text in TEXTS]


def labelled_rows(count=14):
    return [{"text": TEXTS[number][:60], "label": "ab"[number % 2]} for number in range(count)]


def training(base, data, out, **changes):
    """A short run on a CPU."""
    chosen = {"steps": 4, "batch_size": 2, "accumulate": 2, "max_length": 32, "held_out": 0.0, "device": "cpu"}
    record = with_options(Train, changes["method"]) if changes.get("method", "auto") != "auto" else Train
    return record(str(base), data, out, **(chosen | changes))


def words(options):
    """The command line of an options record."""
    found = ["train", str(options.base), options.data]
    for name in options.__dataclass_fields__:
        value, flag = getattr(options, name), name.replace("_", "-")
        if name in ("base", "data") or value is None or value == ():
            continue
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            found += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return found


def steps_of(run):
    """What steps.jsonl has of each step, all but what a clock and a memory say."""
    lines = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CHANGING} for line in lines]


def outcome(run):
    """What must not depend on interruptions."""
    return (run / TRAINED).read_bytes(), steps_of(run)


def interrupting(monkeypatch, *numbers):
    """Send SIGINT at the end of the steps of these numbers."""
    add_step = RunFolder.add_step

    def interrupted(self, step):
        add_step(self, step)
        for _ in range(numbers.count(step.number)):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunFolder, "add_step", interrupted)


def settings(**changes):
    """Of a trainer without a command."""
    chosen = {
        "learning_rate": 1e-3,
        "schedule": "constant",
        "warmup": 0.0,
        "epochs": 1.0,
        "steps": 1,
        "batch_size": 4,
        "accumulate": 1,
        "max_length": 96,
        "packing": False,
        "optimizer": "adamw",
        "precondition": "none",
        "damping": 1e-6,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "activation_offload": False,
        "layer_major": False,
        "save_every": 100,
        "keep": 2,
        "seed": 0,
        "report_to": (),
    }
    return Settings(**(chosen | changes))


def trainer(base, run, rows, chosen, hooks=None, **load):
    """A trainer of a new model from `base`.

    Args:
        rows: Columns input_ids and labels of a data set.
        hooks: A class whose class methods go before those of the method.
    """
    from datasets import Dataset

    model = qsvd.load(base, device="cpu", dtype=torch.float32, **load)
    tokenizer = _tokenizer(base)
    data = Dataset.from_dict(rows)
    if chosen.packing:
        examples = Tokenized("text", rows["input_ids"], rows["labels"], Places("rows", "row", []))
        data = packed_dataset(examples, pack([len(ids) for ids in rows["input_ids"]], chosen.max_length))
    made = make_trainer(model, tokenizer, data, chosen, Path(run))
    if hooks is not None:
        start, made.watch = made.start_hooks, hooks

        def watched(course):
            start(course)
            made.hooks = Watched(hooks, made.hooks, model)

        made.start_hooks = watched
    return made


class Watched:
    """Hooks of a method, after those of a class whose class methods take the model and the step."""

    def __init__(self, first, hooks, model):
        self.first, self.hooks, self.model = first, hooks, model

    def __getattr__(self, name):
        def both(*step):
            if step and hasattr(self.first, name):
                getattr(self.first, name)(self.model, *step)
            return getattr(self.hooks, name)(*step)

        return both


def sequences(lengths=(9, 21, 14, 30)):
    """Real text as tokens, the first third of each untrained."""
    tokenizer = _tokenizer(MODEL)
    ids = [tokenizer(text).input_ids[:length] for text, length in zip(TEXTS, lengths, strict=False)]
    labels = [[UNTRAINED] * (len(one) // 3) + one[len(one) // 3 :] for one in ids]
    return {"input_ids": ids, "labels": labels}


@cache
def _tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)
