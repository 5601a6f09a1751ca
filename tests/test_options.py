"""Flags: the agreed list, each with help, each read by its command."""

import ast
import contextlib
import io
import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

import qsvd
import qsvd.training.settings
from qsvd.cli import COMMANDS, parse
from qsvd.training.settings import Settings

PACKAGE = Path(qsvd.__file__).parent
REQUIRED = "required"

AGREED = {  # a new flag edits this list, and with it the minds of those who agreed on it
    "plan": {
        "model": REQUIRED,
        "task": "all",
        "gpu": None,
        "host": None,
        "rank": None,
        "method": "auto",
        "tokens": None,
        "batch": 1,
        "accumulate": 4,
        "optimizer": "auto",
        "adapter_dtype": "auto",
        "gradient_checkpointing": True,
        "resident": "auto",
        "layer_major": False,
        "double_quant": True,
        "budget": None,
        "allocation": None,
        "explore": False,
        "tflops": None,
        "link": None,
        "disk": None,
        "json": False,
    },
    "allocate": {
        "model": REQUIRED,
        "budget": REQUIRED,
        "out": REQUIRED,
        "allocator": "both",
        "objective": "relative",
        "statistics": None,
        "rank": 64,
        "codecs": (),
        "ranks": (),
        "count": "stored",
        "gap": 1e-4,
        "time_limit": 60.0,
        "include": (),
        "exclude": (),
        "dtype": "bfloat16",
        "device": "auto",
        "seed": 0,
    },
    "calibrate": {
        "model": REQUIRED,
        "data": REQUIRED,
        "out": REQUIRED,
        "examples": 128,
        "max_length": None,
        "traces": 0,
        "loss_on": "answers",
        "map": (),
        "split": "train",
        "include": (),
        "exclude": (),
        "chunk": None,
        "dtype": "auto",
        "device": "auto",
        "seed": 0,
    },
    "quantize": {
        "model": REQUIRED,
        "out": REQUIRED,
        "rank": 64,
        "iterations": 5,
        "order": "svd",
        "end": "svd",
        "stop": "rise",
        "svd": "randomized",
        "dtype": "bfloat16",
        "double_quant": True,
        "budget": None,
        "allocator": "both",
        "objective": "relative",
        "statistics": None,
        "allocation": None,
        "include": (),
        "exclude": (),
        "shard_size": "5GB",
        "device": "auto",
        "seed": 0,
        "dry_run": False,
    },
    "train": {
        "base": REQUIRED,
        "data": REQUIRED,
        "out": REQUIRED,
        "method": "auto",
        "rank": None,
        "alpha": None,
        "learning_rate": None,
        "schedule": "cosine",
        "warmup": 0.03,
        "epochs": 1.0,
        "steps": None,
        "batch_size": 4,
        "accumulate": 4,
        "max_length": None,
        "packing": False,
        "loss_on": "answers",
        "map": (),
        "split": "train",
        "valid": None,
        "held_out": 0.02,
        "optimizer": "auto",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": True,
        "activation_offload": "auto",
        "resident": "auto",
        "layer_major": False,
        "gpu": None,
        "host": None,
        "dtype": "auto",
        "adapter_dtype": "auto",
        "save_every": 100,
        "keep": 2,
        "resume": False,
        "report_to": (),
        "any_start": False,
        "preview": False,
        "dry_run": False,
        "device": "auto",
        "seed": 0,
    },
    "eval": {
        "models": REQUIRED,
        "data": REQUIRED,
        "task": "auto",
        "reference": None,
        "window": None,
        "stride": None,
        "limit": None,
        "batch_size": 8,
        "max_new_tokens": None,
        "map": (),
        "split": "train",
        "base": None,
        "dtype": "auto",
        "resident": "auto",
        "device": "auto",
        "json": False,
    },
    "export": {
        "run": REQUIRED,
        "out": REQUIRED,
        "to": REQUIRED,
        "base": None,
        "original": None,
        "dtype": "auto",
        "shard_size": "5GB",
        "check": True,
    },
    "report": {"folder": REQUIRED, "json": False, "worst": 10},
    "demo": {"out": Path("build/demo"), "ranks": (0, 16, 32, 64), "tokens": 20_000, "epochs": 2.0},
}
READERS = {
    "calibrate": ("prepare/calibrate", "commands/calibrate"),
    "plan": ("prepare/plan", "commands/plan"),
    "allocate": ("prepare/allocate", "commands/allocate"),
    "quantize": ("prepare/quantize", "prepare/outputs", "commands/quantize"),
    "train": ("prepare/train", "commands/train"),
    "eval": ("prepare/evaluate", "prepare/models", "commands/eval"),
    "export": ("prepare/models", "commands/export"),
    "report": ("commands/report",),
    "demo": ("commands/demo",),
}
POSITIONAL = {
    "calibrate": ("model", "data"),
    "plan": ("model",),
    "allocate": ("model",),
    "quantize": ("model",),
    "train": ("base", "data"),
    "eval": ("models",),
    "export": ("run",),
    "report": ("folder",),
    "demo": (),
}
FLAGS = [(command, name) for command, flags in AGREED.items() for name in flags]


def test_the_flags_and_their_defaults_are_the_agreed_ones():
    found = {
        command: {field.name: REQUIRED if field.default is MISSING else field.default for field in fields(record)}
        for command, record in COMMANDS.items()
    }
    assert found == AGREED


def read_in(path, owners):
    """NAME of every `OWNER.NAME` and `anything.OWNER.NAME` in a module, for these owners."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            owner = node.value
            is_bare = isinstance(owner, ast.Name) and owner.id in owners
            if is_bare or (isinstance(owner, ast.Attribute) and owner.attr in owners):
                names.add(node.attr)
    return names


def copied_to_settings():
    """Options of `qsvd train` that prepare_run copies by name into Settings, and that become arguments there."""
    names = {field.name for field in fields(Settings)}
    return names & read_in(Path(qsvd.training.settings.__file__), ("settings",))


@pytest.mark.parametrize(("command", "name"), FLAGS)
def test_each_flag_is_read_by_its_command(command, name):
    read = set().union(*(read_in(PACKAGE / f"{module}.py", ("options",)) for module in READERS[command]))
    if command == "train":
        read |= copied_to_settings()
    assert name in read, "asdict only records a flag; something must act on it"


def test_settings_are_options_and_each_becomes_an_argument_of_a_trainer_or_is_kept_beside_it():
    names = {field.name for field in fields(Settings)}
    assert names <= AGREED["train"].keys()
    assert names - copied_to_settings() == {"keep"}
    assert "keep" in read_in(PACKAGE / "commands" / "train.py", ("options",))


@pytest.mark.parametrize("command", AGREED)
def test_each_flag_is_in_the_help_with_a_sentence(command):
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as ended:
        parse([command, "--help"])
    assert ended.value.code == 0
    text = shown.getvalue()
    for name, default in AGREED[command].items():
        assert name in POSITIONAL[command] or re.search(rf"--(no-)?{name.replace('_', '-')}\b", text)
        if isinstance(default, int | str) and default not in (REQUIRED, True, False):
            assert f"(default: {default})" in " ".join(text.replace("│", " ").split())


def test_records_cannot_be_changed():
    assert all(record.__dataclass_params__.frozen for record in COMMANDS.values())
