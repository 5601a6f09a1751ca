"""Flags of qsvd allocate."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Allocate:
    """Decide how many bits and components every weight gets, so that all fit one budget with the least error.

    Writes a table for qsvd quantize --allocation, which may be edited. Measurements stay beside it, in
    FILE.costs.jsonl: a killed run goes on there, and another budget or allocator takes seconds.
    """

    model: Annotated[Positional[str], arg(metavar="MODEL", help="Folder of a 16-bit checkpoint, or a hub id.")]
    budget: Annotated[
        str, arg(metavar="SIZE", help="2.75bits for each number that is split, or 20GB for all; factors included.")
    ]
    out: Annotated[
        Path, arg(metavar="FILE", help="The table; replaces one that it wrote for this model and nobody edited.")
    ]
    allocator: Annotated[
        Literal["both", "bits", "uniform", "sara", "prilora"],
        arg(help="both: bits and ranks; bits: at --rank (LQ-LoRA); uniform: one pair; sara, prilora: ranks by rule."),
    ] = "both"
    objective: Annotated[
        Literal["relative", "frobenius", "fisher", "hessian"],
        arg(
            help="Errors over the norm of their weight, plain ones, by Fisher information, or by traces of the Hessian."
        ),
    ] = "relative"
    statistics: Annotated[
        Path | None, arg(metavar="FILE", help="Of qsvd calibrate; for the objectives fisher and hessian.")
    ] = None
    rank: Annotated[int, arg(help="Of every weight with allocator bits.")] = 64
    codecs: Annotated[
        tuple[str, ...], arg(metavar="NAME ...", help="To try, nf3-64-8x256; none: seven of 2, 3, 4 and 8 bits.")
    ] = ()
    ranks: Annotated[
        tuple[int, ...], arg(metavar="N ...", help="To try, 0 16 64; none: 0 and powers of two up to 4 bits a number.")
    ] = ()
    count: Annotated[
        Literal["stored", "training"],
        arg(help="What the budget is for: the files, or memory while the factors train, with gradient and state."),
    ] = "stored"
    gap: Annotated[float, arg(help="From the optimum, relative, at which the solver may stop.")] = 1e-4
    time_limit: Annotated[float, arg(help="Seconds for the solver.")] = 60.0
    include: Annotated[
        tuple[str, ...], arg(metavar="GLOB ...", help="Split only modules that match: '*.self_attn.*'.")
    ] = ()
    exclude: Annotated[tuple[str, ...], arg(metavar="GLOB ...", help="Leave modules that match in 16 bits.")] = ()
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], arg(help="Of the stored components.")] = "bfloat16"
    device: Annotated[str, arg(help="auto (a GPU if there is one), cpu, cuda, cuda:1.")] = "auto"
    seed: Annotated[int, arg(help="Of the random sketches.")] = 0
