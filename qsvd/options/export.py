"""Flags of qsvd export."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Export:
    """Write a run of qsvd train, or a result of qsvd quantize, in the form that other tools load."""

    run: Annotated[
        Positional[Path], arg(metavar="RUN", help="A run, a checkpoint of it, or a result of qsvd quantize.")
    ]
    out: Annotated[Path, arg(metavar="DIR", help="Result; a killed export with the same options goes on there.")]
    to: Annotated[
        Literal["peft", "lora", "merged"],
        arg(help="peft: LoRA or DoRA on the residual; lora: on the original 16-bit model; merged: 16-bit weights."),
    ]
    base: Annotated[Path | None, arg(metavar="DIR", help="Base of the run, if it has moved.")] = None
    original: Annotated[
        str | None, arg(metavar="MODEL", help="For lora: the 16-bit model; None: where it was when it was split.")
    ] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        arg(help="Of what is written; auto is float32 for factors, the source's own for merged weights."),
    ] = "auto"
    shard_size: Annotated[str, arg(metavar="SIZE", help="Most bytes of one merged file: 500MB, 5GB.")] = "5GB"
    check: Annotated[bool, arg(help="Load the result and compare its logits, if memory allows.")] = True
