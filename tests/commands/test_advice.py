"""Every option that a message advises is one that the program takes, in the form in which it is advised."""

import ast
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

import qsvd
from qsvd.adapters.methods.table import METHODS
from qsvd.cli import COMMANDS, parse
from qsvd.training.guards import memory_advice
from qsvd.training.settings import Settings

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
FIRST = {"quantize": ["M", "--out", "O"], "train": ["O", "D", "--out", "R"]}
EVERYWHERE = {"--config", "--version", "--help"}
VLLM = {"--max-lora-rank", "--lora-modules", "--enable-lora", "--served-model-name", "--dtype", "--hf-overrides"}
LLAMA_CPP = {"--kl-divergence", "--outtype"}
HUB = {"--local-dir"}  # of hf download
SETTINGS = Settings(
    1e-4, "cosine", 0.03, 1, None, 8, 4, 1024, False, "adamw", "none", 1e-6, 0, 1, False, False, False, 9, 2, 0, ()
)
TORCHRUN = {"--nproc-per-node"}


def known():
    """Every flag of every command."""
    names = {f.name for record in COMMANDS.values() for f in fields(record)}
    names |= {f.name for kind in METHODS.values() for f in fields(kind.options)}
    names |= {f"no_{name}" for name in names} | {"for", "batch", "tokens"}  # and the other names of plan
    return {f"--{name.replace('_', '-')}" for name in names} | EVERYWHERE | VLLM | LLAMA_CPP | HUB | TORCHRUN


def strings():
    """The text of every string in the files of the package that have dashes for a flag, with its file."""
    for file in sorted(Path(qsvd.__file__).parent.rglob("*.py")):
        text = file.read_text()
        for node in ast.walk(ast.parse(text)) if FLAG.search(text) else ():
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield file.name, node.value


def test_no_message_names_a_flag_that_is_not_there():
    found = {(name, flag) for name, text in strings() for flag in FLAG.findall(text)}
    assert len({flag for _, flag in found}) > 30, "the search finds flags"
    assert {(name, flag) for name, flag in found if flag not in known()} == set()


@pytest.mark.parametrize("total", [0, 8e9])
def test_the_advice_after_out_of_memory_parses(total):
    text = memory_advice("tried 2 GiB", SETTINGS, used=7e9, total=total)
    advised = text.partition("; try ")[2].rpartition(" (")[0]
    choices = [choice.removeprefix("or ").removeprefix("a smaller ") for choice in advised.split(", ")]
    assert len(choices) >= 4
    for choice in choices:
        words = choice.split() + (["8"] if choice == "--rank" else [])
        parsed = parse(["train", *FIRST["train"], *words])
        assert parsed != replace(parsed, **{words[0][2:].replace("-", "_"): None}), words
