"""What the options in qsvd/options/ are made of: marks, ranges, options of several commands, and who reads the marks.

An option is a field of a frozen dataclass, `name: Annotated[type, mark, ...] = default`. The marks:

    Help("Random seed.", "INT")   the help text, and how the value is shown in the help
    Group("memory")               starts a group of the help: it holds the options up to the next Group
    POSITIONAL                    the value is given without a flag
    at_least(1), SHARE, ...       the range of the number: `out_of_range` names every value outside
    APPEND                        the flag may be given several times, with one value each
    SAME_RESULT                   the value does not affect the result: `result_options` leaves the option out
    ADDED                         newer than version 0.1: left out at its default, so that older runs resume
    AddedAs("nearest")            newer than version 0.1, which did this
    PRINTS                        the option says what is printed: functions in Python, which print nothing, refuse it
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class Help:
    """Help text of an option. The default is shown after it, except where it is None or empty.

    bare is the value of an option that names a page, FILE.html, where it is given without one; None asks for a value.
    """

    text: str
    metavar: str | None = None
    aliases: tuple[str, ...] | None = None
    bare: str | None = None


@dataclass(frozen=True)
class Group:
    """Start of a group of options."""

    title: str


@dataclass(frozen=True)
class Mark:
    """Property of an option."""

    name: str


@dataclass(frozen=True)
class AddedAs:
    """Property of an option that is newer than version 0.1: the value that version 0.1 would have had."""

    value: str


POSITIONAL = Mark("positional")
APPEND = Mark("may be given several times")
ADDED = Mark("newer than version 0.1")
PRINTS = Mark("says what is printed")
SAME_RESULT = Mark("does not affect the result")  # paths too: files are compared by what they hold


@dataclass(frozen=True)
class Range:
    """Allowed values of an option, and the words for any other value. None is always allowed."""

    holds: Callable[[Any], object]  # a value that counts as true or false
    words: str


def at_least(least: float) -> Range:
    """Return the range from `least` up, infinity included."""
    return Range(lambda value: value >= least, f"is below {least}")


LAST_SEED = 2**32 - 1  # of NumPy's generator, which transformers seeds too
SEED = Range(lambda value: 0 <= value <= LAST_SEED, f"is outside 0..{LAST_SEED}")
ABOVE_ZERO = Range(lambda value: 0 < value < math.inf, "is not a finite number above 0")
ALL_ABOVE_ZERO = Range(
    lambda values: all(0 < value < math.inf for value in values), "has a number that is not finite and above 0"
)
FROM_ZERO = Range(lambda value: 0 <= value < math.inf, "is not a finite number of at least 0")
SECONDS = Range(lambda value: value > 0, "is not above 0")
SHARE = Range(lambda value: 0 <= value < 1, "is not a number from 0 to below 1")
SHARE_ABOVE_ZERO = Range(lambda value: 0 < value < 1, "is not a number above 0 and below 1")
TOP_P = Range(lambda value: 0 < value <= 1, "is not a number above 0 and at most 1")
AUTO_OR_ABOVE_ZERO = Range(lambda value: value == "auto" or value >= 1, "is neither auto nor a number of at least 1")
AUTO_OR_SHARE = Range(lambda value: value == "auto" or 0 <= value <= 1, "is neither auto nor a number from 0 to 1")
INTERCONNECT = Range(
    lambda value: value in ("nvlink", "pcie") or (not isinstance(value, str) and 0 < value < math.inf),
    "is neither nvlink nor pcie nor a finite number of GB/s above 0",
)
DEVICE = Range(lambda value: re.fullmatch(r"auto|(cpu|cuda)(:\d+)?", value), "is not one of auto, cpu, cuda, cuda:N")


def marks_of(record: type) -> dict[str, tuple[Any, ...]]:
    """Return the marks of every option of a record, in the order of its fields."""
    return {name: get_args(hint)[1:] for name, hint in get_type_hints(record, include_extras=True).items()}


def result_options(options: "DataclassInstance") -> dict[str, Any]:
    """Return the options that the stored result depends on, as values of JSON: a tuple becomes a list."""
    marks, defaults = marks_of(type(options)), {field.name: field.default for field in fields(options)}
    values = {name: getattr(options, name) for name in marks if SAME_RESULT not in marks[name]}
    usual = {name: next((mark.value for mark in marks[name] if isinstance(mark, AddedAs)), None) for name in values}
    added = {name: defaults[name] for name in values if ADDED in marks[name]} | {n: v for n, v in usual.items() if v}
    kept = {name: value for name, value in values.items() if name not in added or value != added[name]}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}


def out_of_range(options: object) -> list[str]:
    """Return a clause for every number outside its range, such as "--rank 0 is below 1"."""
    return [
        f"--{name.replace('_', '-')} {value!r} {mark.words}"
        for name, marks in marks_of(type(options)).items()
        for mark in marks
        if isinstance(mark, Range) and (value := getattr(options, name)) is not None and not mark.holds(value)
    ]


# Options of several commands.

Method = Literal[
    "auto",
    "pissa",
    "lora",
    "edora",
    "lora-xs",
    "sorsa",
    "dora",
    "adalora",
    "lora-fa",
    "vera",
    "lora-ga",
    "randlora",
    "melora",
    "kron-lora",
    "singlora",
    "symlora",
    "lora-mini",
    "cora",
    "lorta",
    "lora2",
    "sara",
    "mo-sara",
    "r-lora",
    "delta-lora",
    "weightlora",
    "losa",
    "xgblora",
]
Optimizer = Literal["auto", "adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lora-rite"]
Step = Literal["svd", "quantize"]

Model = Annotated[str, POSITIONAL, Help("Folder of a 16-bit model, or a Hub id.", "MODEL")]
Data = Annotated[
    str,
    POSITIONAL,
    Help("JSON, JSONL, CSV, Parquet or text file, folder with train and valid files, or Hub id.", "DATA"),
]
Allocator = Annotated[
    Literal["both", "bits", "uniform", "sara", "prilora"],
    Help("both: bits and ranks; bits: at --rank (LQ-LoRA); uniform: all alike; sara, prilora: ranks by rule."),
]
Objective = Annotated[
    Literal["relative", "frobenius", "fisher", "hessian"],
    Help("Error to minimize: relative to each weight, plain, or weighted by Fisher information or Hessian traces."),
]
Include = Annotated[tuple[str, ...], Help("Layers to use, e.g. '*.self_attn.*'. Default: all.", "GLOB ...")]
Exclude = Annotated[tuple[str, ...], Help("Layers to leave in 16 bits.", "GLOB ...")]
IncludeTowers = Annotated[bool, Help("Also quantize the encoders of images and sound.")]
Map = Annotated[tuple[str, ...], Help("Rename columns of the data to the names that qsvd knows.", "COLUMN=NAME ...")]
DataSplit = Annotated[str, Help("Split of a Hub data set or a folder.")]
MaxLength = Annotated[
    int | None, at_least(2), Help("Maximum sequence length; longer texts are divided. Default: context, at most 1024.")
]
LossOn = Annotated[Literal["answers", "all"], Help("Compute the loss on answers only, or on all tokens.")]
Statistics = Annotated[Path | None, Help("Output of qsvd calibrate, for objectives fisher and hessian.", "FILE")]
Allocation = Annotated[Path | None, Help("Output of qsvd allocate: format and rank of each layer.", "FILE")]
HeadBits = Annotated[Literal[8, 4] | None, ADDED, Help("Bits of the output head. Default: it stays in 16 bits.", "8|4")]
EmbeddingBits = Annotated[
    Literal[8] | None, ADDED, Help("Bits of the token embedding. Default: it stays in 16 bits.", "8")
]
ExpertRank = Annotated[int | None, at_least(0), Help("Components per expert. Default: --rank, at most 16.")]
Format = Annotated[
    Literal["nf4", "int4-128", "int4-64", "int4-32"],
    ADDED,
    Help("Format of the 4-bit weights: nf4 (bitsandbytes), or int4 in groups (compressed-tensors, read by vLLM)."),
]
DoubleQuant = Annotated[
    bool, Help("Quantize the scales of nf4 to 8 bits: 4.13 bits per weight in total instead of 4.5.")
]
StoredDtype = Annotated[Literal["bfloat16", "float16", "float32"], Help("Dtype of the stored components.")]
ComputeDtype = Annotated[
    Literal["auto", "bfloat16", "float32"], Help("Compute dtype. auto: bfloat16 on a GPU, float32 on a CPU.")
]
AdapterDtype = Annotated[
    Literal["auto", "float32", "bfloat16"],
    Help("Dtype of the trained parameters. auto: float32 up to 268 M, else bfloat16."),
]
BatchSize = Annotated[int, at_least(1), Help("Sequences per forward pass.")]
MicroBatch = Annotated[
    Literal["auto"] | int,
    AUTO_OR_ABOVE_ZERO,
    Help("Sequences per forward pass. auto: as many as make the shortest step; --step-tokens is the whole step."),
]
StepTokens = Annotated[
    int | None,
    SAME_RESULT,  # --batch-size and --accumulate, which follow from it, do affect the result
    at_least(1),
    Help("Tokens per optimizer step, roughly, with --batch-size auto. Default: 16 sequences."),
]
Accumulate = Annotated[int, at_least(1), Help("Batches per optimizer step.")]
Checkpointing = Annotated[
    Literal["auto", "yes", "no"],
    Help("Compute activations of blocks twice instead of keeping them. auto: of the blocks that have no room."),
]
Resident = Annotated[
    Literal["auto"] | float,
    AUTO_OR_SHARE,
    Help("Fraction of blocks whose weights stay on the GPU; the rest is offloaded. auto: as many as fit."),
]
LayerMajor = Annotated[
    bool, Help("Run all batches of a step through one block, then the next: weights are copied once per step.")
]
ShardSize = Annotated[str, Help("Maximum size of one output file, e.g. 500MB or 5GB.", "SIZE")]
Device = Annotated[str, DEVICE, Help("auto (a GPU if there is one), cpu, cuda or cuda:1.", "DEVICE")]
Seed = Annotated[int, Help("Random seed.")]
Base = Annotated[Path | None, Help("Quantized model of the run, if it has moved.", "OUT")]
PushToHub = Annotated[
    str | None, Help("Upload the finished folder to this Hub repository, private by default.", "NAME")
]
Public = Annotated[bool, Help("Make a new Hub repository public.")]
Json = Annotated[bool, PRINTS, Help("Print JSON.")]
