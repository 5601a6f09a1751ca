"""Flags: the agreed list, each with help, each read by its command."""

import ast
import contextlib
import io
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

import qsvd.commands
from qsvd.cli import COMMANDS, parse

COMMANDS_FOLDER = Path(qsvd.commands.__file__).parent
REQUIRED = "required"

AGREED = {  # a new flag edits this list, and with it the minds of those who agreed on it
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
        "include": (),
        "exclude": (),
        "shard_size": "5GB",
        "device": "auto",
        "seed": 0,
        "dry_run": False,
    },
    "report": {"folder": REQUIRED, "json": False, "worst": 10},
    "demo": {"out": Path("build/demo"), "ranks": (0, 16, 32, 64), "tokens": 20_000},
}
READERS = {"quantize": ("prepare", "quantize", "finish", "dry_run"), "report": ("report",), "demo": ("demo",)}
FLAGS = [(command, name) for command, flags in AGREED.items() for name in flags]


def test_the_flags_and_their_defaults_are_the_agreed_ones():
    found = {
        command: {field.name: REQUIRED if field.default is MISSING else field.default for field in fields(record)}
        for command, record in COMMANDS.items()
    }
    assert found == AGREED


def read_in(modules):
    """NAME of every `options.NAME`, `self.options.NAME` and `job.options.NAME` in these modules."""
    names = set()
    for module in modules:
        for node in ast.walk(ast.parse((COMMANDS_FOLDER / f"{module}.py").read_text())):
            if isinstance(node, ast.Attribute):
                owner = node.value
                is_options = isinstance(owner, ast.Name) and owner.id == "options"
                if is_options or (isinstance(owner, ast.Attribute) and owner.attr == "options"):
                    names.add(node.attr)
    return names


@pytest.mark.parametrize(("command", "name"), FLAGS)
def test_each_flag_is_read_by_its_command(command, name):
    assert name in read_in(READERS[command]), "asdict only records a flag; something must act on it"


@pytest.mark.parametrize("command", AGREED)
def test_each_flag_is_in_the_help_with_a_sentence(command):
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as ended:
        parse([command, "--help"])
    assert ended.value.code == 0
    text = shown.getvalue()
    for name, default in AGREED[command].items():
        positional = (command, name) in {("quantize", "model"), ("report", "folder")}
        assert (name if positional else f"--{name.replace('_', '-')}").lower() in text.lower() or positional
        if isinstance(default, int | str) and default not in (REQUIRED, True, False):
            assert f"(default: {default})" in " ".join(text.replace("│", " ").split())


def test_records_cannot_be_changed():
    assert all(record.__dataclass_params__.frozen for record in COMMANDS.values())
