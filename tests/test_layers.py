"""Imports point down: a module imports from its own layer or from a lower one."""

import ast
from pathlib import Path

import pytest

import qsvd

PACKAGE = Path(qsvd.__file__).parent
LAYERS = (
    *("numerics", "decompose", "plan", "checkpoint", "adapters", "calibrate"),
    *("train", "evaluate", "report", "commands", "cli"),
)
ABOVE_ALL = {"__init__", "__main__"}
USERS_OF_OPTIONS = {"commands", "cli"}
CLOCKS = {"time", "datetime", "timeit"}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem not in ABOVE_ALL)


def imported(path):
    """Every module that a file imports, at its head, in a function or for type checkers; ("qsvd", "plan", "model")."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports by a relative name"
            yield from ((*str(node.module).split("."), alias.name) for alias in node.names)


def layer_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def name_of(path):
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path):
    layer = layer_of(path)
    used = {parts[1] for parts in imported(path) if parts[0] == "qsvd" and len(parts) > 1}
    if layer in ("options", "demo"):  # records of flags, and a folder of files
        assert used <= {"options"} & {layer}
        return
    below = {*LAYERS[: LAYERS.index(layer) + 1], *({"options"} if layer in USERS_OF_OPTIONS else ())}
    assert used <= below


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_commands_read_the_clock(path):
    assert layer_of(path) == "commands" or not CLOCKS & {parts[0] for parts in imported(path)}


def test_the_walk_finds_the_modules_and_their_imports():
    assert {layer_of(path) for path in MODULES} >= {"numerics", "checkpoint", "commands", "cli", "options"}
    lines = {".".join(parts) for parts in imported(PACKAGE / "commands" / "quantize.py")}
    assert "qsvd.checkpoint.write.OutputFolder" in lines
