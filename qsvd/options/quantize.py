"""Flags of what makes a split base, and of the table of what it cost."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Quantize:
    """Split a 16-bit checkpoint into a residual of few bits and principal components, with a report of the error.

    4 bits and --rank for every weight, or bits and ranks where they count within one --budget.

    Flags may stand in a YAML file, `--config FILE.yaml`; those on the command line win.
    """

    model: Annotated[Positional[str], arg(metavar="MODEL", help="Folder of a 16-bit checkpoint, or a hub id.")]
    out: Annotated[Path, arg(metavar="DIR", help="Result; a killed run with the same options goes on there.")]
    rank: Annotated[int, arg(help="Principal components kept in high precision; 0 is plain NF4 (QLoRA).")] = 64
    iterations: Annotated[int, arg(help="Most passes of the loop; the best is kept.")] = 5
    order: Annotated[
        Literal["svd", "quantize"], arg(help="What comes first: svd is QPiSSA and LQ-LoRA, quantize is LoftQ.")
    ] = "svd"
    end: Annotated[
        Literal["svd", "quantize"],
        arg(help="What a pass ends with: svd fits the factors once more; quantize is QPiSSA as published."),
    ] = "svd"
    stop: Annotated[Literal["rise", "never"], arg(help="End the loop when the error rises, or never.")] = "rise"
    svd: Annotated[Literal["randomized", "exact"], arg(help="exact is slow above a side of some thousand.")] = (
        "randomized"
    )
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], arg(help="Of the stored components.")] = "bfloat16"
    double_quant: Annotated[bool, arg(help="Scales in 8 bits: 4.13 bits a weight in all instead of 4.5.")] = True
    budget: Annotated[
        str | None,
        arg(
            metavar="SIZE",
            help="2.75bits for each number that is split, or 20GB for all: tensors, components included.",
        ),
    ] = None
    allocator: Annotated[
        Literal["both", "bits", "uniform", "sara", "prilora"],
        arg(help="What a budget decides, as in qsvd allocate: both: bits and ranks; bits: at --rank (LQ-LoRA)."),
    ] = "both"
    objective: Annotated[
        Literal["relative", "frobenius", "fisher", "hessian"],
        arg(help="What a budget minimises: errors over the norm of each weight, plain ones, or by statistics."),
    ] = "relative"
    statistics: Annotated[
        Path | None, arg(metavar="FILE", help="Of qsvd calibrate; for the objectives fisher and hessian.")
    ] = None
    allocation: Annotated[
        Path | None, arg(metavar="FILE", help="Codec and rank of every weight, as qsvd allocate writes them.")
    ] = None
    include: Annotated[
        tuple[str, ...], arg(metavar="GLOB ...", help="Split only modules that match: '*.self_attn.*'.")
    ] = ()
    exclude: Annotated[tuple[str, ...], arg(metavar="GLOB ...", help="Leave modules that match in 16 bits.")] = ()
    shard_size: Annotated[str, arg(metavar="SIZE", help="Most bytes of one output file: 500MB, 5GB.")] = "5GB"
    device: Annotated[str, arg(help="auto (a GPU if there is one), cpu, cuda, cuda:1.")] = "auto"
    seed: Annotated[int, arg(help="Of the random sketches.")] = 0
    dry_run: Annotated[bool, arg(help="Print options, weights and sizes, and stop.")] = False


@dataclass(frozen=True)
class Report:
    """Show what quantization cost: a table by role, the worst weights, the totals."""

    folder: Annotated[Positional[Path], arg(metavar="DIR", help="A result of qsvd quantize.")]
    json: Annotated[bool, arg(help="Print everything as JSON.")] = False
    worst: Annotated[int, arg(help="How many of the worst weights to list.")] = 10
