"""Options: the agreed list, each with help, each read by its command; their marks and ranges."""

import ast
import contextlib
import io
import json
import math
import re
from dataclasses import MISSING, fields, replace
from pathlib import Path

import pytest

import qsvd
from qsvd.cli import COMMANDS, parse
from qsvd.option_types import SAME_RESULT, Range, marks_of, out_of_range, result_options
from qsvd.options.quantizing import with_quality
from qsvd.prepare.comparing.rows import SHARED
from qsvd.training.settings import Settings

PACKAGE = Path(qsvd.__file__).parent
REQUIRED = "required"

AGREED = {  # a new flag edits this list, and with it the minds of those who agreed on it
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
        "calibrate": None,
        "sensitivity": None,
        "examples": 128,
        "max_length": None,
        "map": (),
        "split": "train",
        "include": (),
        "exclude": (),
        "include_towers": False,
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
        "gradient_rank": None,
        "loss_on": "answers",
        "map": (),
        "split": "train",
        "include": (),
        "exclude": (),
        "include_towers": False,
        "chunk": None,
        "dtype": "auto",
        "device": "auto",
        "seed": 0,
    },
    "quantize": {
        "model": REQUIRED,
        "out": REQUIRED,
        "rank": 64,
        "expert_rank": None,
        "quality": None,
        "iterations": None,
        "order": "svd",
        "end": "svd",
        "stop": "rise",
        "scales": None,
        "rounding": None,
        "svd": "randomized",
        "dtype": "bfloat16",
        "codec": "nf4",
        "double_quant": True,
        "head_bits": None,
        "embedding_bits": None,
        "calibrate": None,
        "sensitivity": None,
        "examples": 128,
        "max_length": None,
        "map": (),
        "split": "train",
        "budget": None,
        "allocator": "both",
        "objective": "relative",
        "statistics": None,
        "allocation": None,
        "include": (),
        "exclude": (),
        "include_towers": False,
        "shard_size": "5GB",
        "device": "auto",
        "seed": 0,
        "dry_run": False,
        "push_to_hub": None,
        "public": False,
    },
    "train": {
        "base": REQUIRED,
        "data": REQUIRED,
        "out": REQUIRED,
        "shard": "no",
        "method": "auto",
        "rank": None,
        "alpha": None,
        "train_experts": False,
        "init_from": None,
        "rslora": False,
        "dropout": 0.0,
        "target_modules": (),
        "budget": None,
        "allocation": None,
        "expert_rank": None,
        "include_towers": False,
        "codec": "nf4",
        "double_quant": True,
        "head_bits": None,
        "embedding_bits": None,
        "quantized": None,
        "learning_rate": None,
        "schedule": "cosine",
        "warmup": 0.03,
        "epochs": 1.0,
        "steps": None,
        "batch_size": 4,
        "accumulate": 4,
        "step_tokens": None,
        "task": "auto",
        "chat_template": None,
        "max_length": None,
        "packing": False,
        "loss_on": "answers",
        "map": (),
        "split": "train",
        "valid": None,
        "held_out": 0.02,
        "eval_every": None,
        "keep_best": False,
        "early_stopping": None,
        "optimizer": "auto",
        "precondition": "none",
        "damping": 1e-6,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": "auto",
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
        "push_to_hub": None,
        "public": False,
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
    "generate": {
        "model": REQUIRED,
        "image": (),
        "audio": (),
        "prompt": (),
        "chat": False,
        "system": None,
        "raw": False,
        "temperature": None,
        "top_p": None,
        "max_new_tokens": None,
        "seed": 0,
        "base": None,
        "dtype": "auto",
        "resident": "auto",
        "device": "auto",
    },
    "prune": {"model": REQUIRED, "out": REQUIRED, "keep": 0.5, "shard_size": "5GB"},
    "compare": {
        "model": REQUIRED,
        "data": REQUIRED,
        "out": REQUIRED,
        "methods": ("lora", "pissa", "dora"),
        "splits": (),
        "equal": "rank",
        "size": None,
        "rates": (),
        "seeds": 3,
        "epochs": 1.0,
        "steps": None,
        "batch_size": 4,
        "accumulate": 4,
        "task": "auto",
        "chat_template": None,
        "max_length": None,
        "loss_on": "answers",
        "map": (),
        "keep_runs": False,
        "dtype": "auto",
        "device": "auto",
        "dry_run": False,
    },
    "aggregate": {"runs": REQUIRED, "out": REQUIRED, "rank": None, "weights": (), "base": None},
    "export": {
        "run": REQUIRED,
        "out": REQUIRED,
        "to": REQUIRED,
        "base": None,
        "original": None,
        "dtype": "auto",
        "shard_size": "5GB",
        "check": True,
        "push_to_hub": None,
        "public": False,
    },
    "methods": {"json": False},
    "report": {"folders": REQUIRED, "html": None, "live": False, "json": False, "worst": 10},
    "verify": {"path": REQUIRED, "accept": False},
    "demo": {"out": Path("build/demo"), "ranks": (0, 16, 32, 64), "tokens": 20_000, "epochs": 2.0},
}
NOT_SHARED = (
    *(
        "base",
        "data",
        "out",
        "shard",
        "quantized",
        "save_every",
        "keep",
        "resume",
        "report_to",
        "any_start",
        "preview",
        "dry_run",
    ),
    *("push_to_hub", "public"),
)
AGREED["plan"] = {
    "model": REQUIRED,
    "data": None,
    "estimate": "auto",
    "explore": False,
    "tflops": None,
    "link": None,
    "disk": None,
    "gpus": None,
    "interconnect": "pcie",
    "json": False,
} | {name: default for name, default in AGREED["train"].items() if name not in NOT_SHARED}
READERS = {
    "calibrate": ("options/conflicts", "prepare/models", "prepare/calibrate", "commands/calibrate"),
    "plan": (
        "prepare/check_options",
        "options/conflicts",
        "prepare/plan",
        "prepare/machine",
        "prepare/train",
        "data/examples",
        "commands/plan",
    ),
    "allocate": (
        "options/conflicts",
        "prepare/models",
        "prepare/allocate",
        "prepare/quantizing/calibration",
        "commands/allocate",
    ),
    "quantize": (
        "export/hub",
        "prepare/models",
        "prepare/check_options",
        "options/conflicts",
        "options/quantizing",
        "prepare/quantize",
        "prepare/quantizing/calibration",
        "prepare/allocate",
        "prepare/outputs",
        "commands/quantize",
    ),
    "train": (
        "export/hub",
        "prepare/machine",
        "prepare/check_options",
        "options/conflicts",
        "prepare/train",
        "prepare/quantize_first",
        "data/examples",
        "console/journal",
        "commands/train",
    ),
    "eval": (
        "options/conflicts",
        "prepare/evaluate",
        "data/examples",
        "prepare/models",
        "commands/eval",
    ),
    "generate": ("options/conflicts", "prepare/generate", "commands/generate"),
    "prune": ("prepare/using/prune", "commands/prune"),
    "compare": (
        "prepare/comparing/rows",
        "prepare/comparing/sizes",
        "prepare/comparing/compare",
        "console/cells",
        "commands/compare",
    ),
    "aggregate": ("options/conflicts", "prepare/using/aggregate"),
    "export": ("export/hub", "prepare/models", "prepare/using/export", "commands/export"),
    "methods": ("commands/methods",),
    "report": ("options/conflicts", "commands/report"),
    "verify": ("commands/verify",),
    "demo": ("commands/demo",),
}
POSITIONAL = {
    "calibrate": ("model", "data"),
    "plan": ("model", "data"),
    "allocate": ("model",),
    "quantize": ("model",),
    "train": ("base", "data"),
    "eval": ("models",),
    "generate": ("model",),
    "prune": ("model",),
    "compare": ("model", "data"),
    "aggregate": ("runs",),
    "export": ("run",),
    "methods": (),
    "report": ("folders",),
    "verify": ("path",),
    "demo": (),
}
COMPARED = {  # what version 0.1 wrote in the identity of a run, before values that are not options
    "quantize": {
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
        "include": [],
        "exclude": [],
        "shard_size": "5GB",
        "device": "auto",
        "seed": 0,
    },
    "train": {
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
        "map": [],
        "split": "train",
        "held_out": 0.02,
        "optimizer": "auto",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "layer_major": False,
        "dtype": "auto",
        "adapter_dtype": "auto",
        "device": "auto",
        "seed": 0,
    },
    "calibrate": {
        "examples": 128,
        "max_length": None,
        "traces": 0,
        "loss_on": "answers",
        "include": [],
        "exclude": [],
        "dtype": "auto",
        "device": "auto",
        "seed": 0,
    },
    "allocate": {"codecs": [], "ranks": [], "dtype": "bfloat16", "device": "auto", "seed": 0},
}
ADDED = {
    ("train", name)
    for name in (
        "target_modules",
        "dropout",
        "rslora",
        "keep_best",
        "early_stopping",
        "train_experts",
        "precondition",
        "damping",
    )
} | {
    ("calibrate", "gradient_rank"),
    ("allocate", "sensitivity"),
    ("allocate", "examples"),
    ("allocate", "max_length"),
    ("quantize", "expert_rank"),
    ("quantize", "scales"),
    ("quantize", "rounding"),
    ("quantize", "quality"),
    ("quantize", "sensitivity"),
    ("quantize", "examples"),
    ("quantize", "max_length"),
    ("quantize", "include_towers"),
    ("calibrate", "include_towers"),
    ("quantize", "head_bits"),
    ("quantize", "codec"),
    ("quantize", "embedding_bits"),
}  # since: compared if they are given
OUTSIDE = {  # option -> values outside its range, and the words for them
    ("plan", "rank"): ([-1], "is below 0"),
    ("plan", "max_length"): ([1], "is below 2"),
    ("plan", "batch_size"): ([0], "is neither auto nor a number of at least 1"),
    ("plan", "accumulate"): ([0], "is below 1"),
    ("plan", "resident"): ([1.5, -0.1, math.nan], "is neither auto nor a number from 0 to 1"),
    ("plan", "tflops"): ([0.0, math.inf], "is not a finite number above 0"),
    ("plan", "link"): ([-3.0, math.nan], "is not a finite number above 0"),
    ("plan", "gpus"): ([1, 0], "is below 2"),
    ("plan", "interconnect"): ([0.0, math.inf], "is neither nvlink nor pcie nor a finite number of GB/s above 0"),
    ("plan", "disk"): ([0.0], "is not a finite number above 0"),
    ("allocate", "gap"): ([-1e-9, math.nan], "is below 0"),
    ("allocate", "examples"): ([0], "is below 1"),
    ("allocate", "max_length"): ([1], "is below 2"),
    ("allocate", "time_limit"): ([0.0, math.nan], "is not above 0"),
    ("calibrate", "examples"): ([0], "is below 1"),
    ("calibrate", "max_length"): ([1], "is below 2"),
    ("calibrate", "traces"): ([-1], "is below 0"),
    ("calibrate", "chunk"): ([0], "is below 1"),
    ("calibrate", "gradient_rank"): ([0], "is below 1"),
    ("quantize", "rank"): ([-1], "is below 0"),
    ("quantize", "expert_rank"): ([-1], "is below 0"),
    ("train", "expert_rank"): ([-1], "is below 0"),
    ("plan", "expert_rank"): ([-1], "is below 0"),
    ("quantize", "iterations"): ([0], "is below 1"),
    ("quantize", "examples"): ([0], "is below 1"),
    ("quantize", "max_length"): ([1], "is below 2"),
    ("train", "rank"): ([0], "is below 1"),
    ("train", "eval_every"): ([0], "is below 1"),
    ("train", "early_stopping"): ([0], "is below 1"),
    ("train", "alpha"): ([0.0, math.inf, math.nan], "is not a finite number above 0"),
    ("train", "dropout"): ([1.0, -0.1, math.nan], "is not a number from 0 to below 1"),
    ("train", "learning_rate"): ([0.0, math.inf, math.nan], "is not a finite number above 0"),
    ("train", "warmup"): ([1.0, -0.1, math.nan], "is not a number from 0 to below 1"),
    ("train", "epochs"): ([0.0, math.inf], "is not a finite number above 0"),
    ("train", "steps"): ([0], "is below 1"),
    ("train", "batch_size"): ([0, -1], "is neither auto nor a number of at least 1"),
    ("train", "step_tokens"): ([0], "is below 1"),
    ("train", "accumulate"): ([0, -1], "is below 1"),
    ("train", "max_length"): ([1], "is below 2"),
    ("train", "held_out"): ([1.0, -0.1], "is not a number from 0 to below 1"),
    ("train", "damping"): ([0.0, math.inf, math.nan], "is not a finite number above 0"),
    ("train", "weight_decay"): ([-0.1, math.inf], "is not a finite number of at least 0"),
    ("train", "max_grad_norm"): ([-0.1, math.nan], "is not a finite number of at least 0"),
    ("train", "resident"): ([1.5], "is neither auto nor a number from 0 to 1"),
    ("train", "save_every"): ([0], "is below 1"),
    ("train", "keep"): ([0], "is below 1"),
    ("train", "seed"): ([-1, 2**32], "is outside 0..4294967295"),
    ("eval", "window"): ([1], "is below 2"),
    ("eval", "stride"): ([0], "is below 1"),
    ("eval", "max_new_tokens"): ([0], "is below 1"),
    ("eval", "limit"): ([0], "is below 1"),
    ("prune", "keep"): ([0.0, 1.0, math.nan], "is not a number above 0 and below 1"),
    ("compare", "rates"): ([(1e-3, 0.0), (math.inf,)], "has a number that is not finite and above 0"),
    ("compare", "seeds"): ([0], "is below 1"),
    ("compare", "epochs"): ([0.0, math.inf], "is not a finite number above 0"),
    ("compare", "steps"): ([0], "is below 1"),
    ("compare", "batch_size"): ([0], "is below 1"),
    ("compare", "accumulate"): ([0], "is below 1"),
    ("compare", "max_length"): ([1], "is below 2"),
    ("aggregate", "rank"): ([0], "is below 1"),
    ("aggregate", "weights"): ([(1.0, 0.0), (math.inf,)], "has a number that is not finite and above 0"),
    ("eval", "batch_size"): ([0], "is below 1"),
    ("eval", "resident"): ([-1.0], "is neither auto nor a number from 0 to 1"),
    ("generate", "temperature"): ([-0.1, math.inf, math.nan], "is not a finite number of at least 0"),
    ("generate", "top_p"): ([0.0, 1.1, math.nan], "is not a number above 0 and at most 1"),
    ("generate", "max_new_tokens"): ([0], "is below 1"),
    ("generate", "seed"): ([-1, 2**32], "is outside 0..4294967295"),
    ("generate", "resident"): ([1.5], "is neither auto nor a number from 0 to 1"),
    **{
        (command, "device"): (["", "gpu", "cpu:x", "cuda:", "meta"], "is not one of auto, cpu, cuda, cuda:N")
        for command in ("allocate", "calibrate", "quantize", "train", "eval", "generate", "compare")
    },
    ("report", "worst"): ([-1], "is below 0"),
    ("demo", "epochs"): ([0.0, math.inf], "is not a finite number above 0"),
}
INSIDE = {  # the last values inside
    ("prune", "keep"): [1e-9, 0.999],
    ("aggregate", "weights"): [(), (1e-9, 1.0)],
    ("plan", "resident"): [0, 0.0, 1, "auto"],
    ("plan", "interconnect"): ["nvlink", "pcie", 1e-9],
    ("train", "batch_size"): [1, "auto"],
    ("allocate", "gap"): [0.0, math.inf],
    ("allocate", "time_limit"): [1e-9, math.inf],
    ("train", "warmup"): [0.0, 0.999],
    ("train", "weight_decay"): [0.0],
    ("train", "alpha"): [1e-9, None],
    ("train", "seed"): [0, 2**32 - 1],
    ("quantize", "rank"): [0],
    ("quantize", "device"): ["auto", "cpu", "cuda", "cuda:12"],
    ("eval", "window"): [2, None],
    ("generate", "top_p"): [1e-9, 1.0, None],
    ("generate", "temperature"): [0.0],
}
OUTSIDE |= {  # what plan has of train
    ("plan", name): wrong
    for (command, name), wrong in OUTSIDE.items()
    if command == "train" and name in AGREED["plan"] and ("plan", name) not in OUTSIDE
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
    """Options of `qsvd train` that prepare_train copies by name into Settings, and that trainers use."""
    names = {field.name for field in fields(Settings)}
    readers = (PACKAGE / "training" / f"{name}.py" for name in ("settings", "trainer"))
    return names & set().union(*(read_in(path, ("settings",)) for path in readers))


@pytest.mark.parametrize("command", AGREED)
def test_each_flag_is_read_by_its_command(command):
    """asdict only records a flag; something must act on it."""
    read = set().union(*(read_in(PACKAGE / f"{module}.py", ("options", "chosen")) for module in READERS[command]))
    if command in ("train", "plan"):
        read |= copied_to_settings()
    if command == "compare":
        read |= {*SHARED} & AGREED["train"].keys()  # copied by name into the options of each run
    assert AGREED[command].keys() - read == set()


def test_settings_are_options_and_a_trainer_uses_each():
    names = {field.name for field in fields(Settings)}
    assert names - {"unrecomputed"} <= AGREED["train"].keys(), "that one is for the planner to choose"
    assert names == copied_to_settings()


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


@pytest.mark.parametrize("command", AGREED)
def test_the_help_shows_no_None_and_no_empty_default(command, capsys):
    with pytest.raises(SystemExit):
        parse([command, "--help"])
    shown = capsys.readouterr().out
    assert "None" not in shown
    assert "(default: )" not in shown


def test_the_help_has_a_box_for_each_group(capsys):
    with pytest.raises(SystemExit):
        parse(["train", "--help"])
    shown = capsys.readouterr().out
    titles = re.findall(r"(\w+) options", shown)
    assert titles == ["adapter", "model", "schedule", "data", "evaluation", "optimizer", "memory", "run", "output"]
    assert shown.index("memory options") < shown.index("--layer-major") < shown.index("run options")


def example(command):
    """A record with its defaults; what has none is a word."""
    record = COMMANDS[command]
    found = record(**{field.name: "x" for field in fields(record) if field.default is MISSING})
    return with_quality(found) if command == "quantize" else found


def other(value):
    """Another value than that of an option."""
    return value * 2 + 1 if type(value) in (int, float) else not value if type(value) is bool else f"other than {value}"


@pytest.mark.parametrize("command", COMPARED)
def test_a_run_is_compared_by_the_options_that_version_0_1_wrote(command):
    assert result_options(example(command)) == COMPARED[command]
    assert json.loads(json.dumps(COMPARED[command])) == COMPARED[command]


@pytest.mark.parametrize(("command", "name"), [flag for flag in FLAGS if flag[0] in COMPARED])
def test_an_option_changes_what_is_compared_unless_its_mark_says_that_the_result_is_the_same(command, name):
    options = example(command)
    changed = replace(options, **{name: other(getattr(options, name))})
    assert (result_options(changed) == result_options(options)) is (
        name not in COMPARED[command] and (command, name) not in ADDED
    )


def test_commands_without_an_identity_mark_nothing():
    younger = {"prune"}  # than version 0.1, with an identity
    rest = [record for command, record in COMMANDS.items() if command not in {*COMPARED, *younger}]
    marked = {name for record in rest for name, marks in marks_of(record).items() if SAME_RESULT in marks}
    assert marked <= AGREED["train"].keys(), "plan has options of train"


def test_every_range_is_tested():
    ranged = {
        (command, name)
        for command, record in COMMANDS.items()
        for name, marks in marks_of(record).items()
        if any(isinstance(mark, Range) for mark in marks)
    }
    assert ranged == OUTSIDE.keys()


@pytest.mark.parametrize(("command", "name"), OUTSIDE)
def test_a_number_outside_its_range_is_named_with_its_value(command, name):
    values, words = OUTSIDE[command, name]
    flag = f"--{name.replace('_', '-')}"
    for value in values:
        assert out_of_range(replace(example(command), **{name: value})) == [f"{flag} {value!r} {words}"]


@pytest.mark.parametrize(("command", "name"), INSIDE)
def test_the_ends_of_a_range_are_allowed(command, name):
    assert [out_of_range(replace(example(command), **{name: value})) for value in INSIDE[command, name]] == [
        [] for _ in INSIDE[command, name]
    ]


def test_every_number_outside_is_named_in_the_order_of_the_options():
    options = replace(example("train"), keep=0, rank=0, warmup=1.0)
    assert out_of_range(options) == [
        "--rank 0 is below 1",
        "--warmup 1.0 is not a number from 0 to below 1",
        "--keep 0 is below 1",
    ]


def test_records_cannot_be_changed():
    assert all(record.__dataclass_params__.frozen for record in COMMANDS.values())
