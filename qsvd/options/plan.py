"""Flags of qsvd plan."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Plan:
    """Say before any work what fits: bytes on GPU, host and disk, by item, from config.json alone.

    The exit code is 3 where something does not fit.
    """

    model: Annotated[
        Positional[str],
        arg(metavar="MODEL", help="A 16-bit checkpoint, a result of qsvd quantize, a config.json, or a hub id."),
    ]
    task: Annotated[
        Literal["all", "quantize", "train", "serve"], arg(aliases=["--for"], help="What shall be done with it.")
    ] = "all"
    gpu: Annotated[
        str | None, arg(metavar="SIZE", help="Memory of the card, 24GB; None: of the one here, or no limit.")
    ] = None
    host: Annotated[
        str | None, arg(metavar="SIZE", help="Memory of the host, 64GB; None: what is free where a card is here.")
    ] = None
    rank: Annotated[int | None, arg(help="Of the components; None: the stored one, or 64.")] = None
    method: Annotated[
        Literal["auto", "pissa", "lora", "edora"], arg(help="As in qsvd train; lora on a 16-bit MODEL is QLoRA.")
    ] = "auto"
    tokens: Annotated[int | None, arg(help="Of a sequence; None: the context, 2048 at most.")] = None
    batch: Annotated[int, arg(help="Sequences that go through the model together.")] = 1
    accumulate: Annotated[int, arg(help="Batches in one step.")] = 4
    optimizer: Annotated[
        Literal["auto", "adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"],
        arg(help="auto is paged_adamw_8bit."),
    ] = "auto"
    adapter_dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], arg(help="Of what is trained; auto is float32 up to 268 M parameters.")
    ] = "auto"
    gradient_checkpointing: Annotated[bool, arg(help="Compute activations twice instead of keeping them.")] = True
    resident: Annotated[
        Literal["auto"] | float, arg(help="Share of blocks that stay on the card, 0 to 1; auto: as many as fit.")
    ] = "auto"
    layer_major: Annotated[
        bool, arg(help="All batches of a step go through a block before the next block: weights move once for all.")
    ] = False
    double_quant: Annotated[bool, arg(help="Scales in 8 bits: 4.13 bits a weight in all instead of 4.5.")] = True
    budget: Annotated[
        str | None, arg(metavar="SIZE", help="For residuals and components of rank --rank: 2.75bits, 20GB. None: NF4.")
    ] = None
    allocation: Annotated[
        Path | None, arg(metavar="FILE", help="Codec and rank of every weight, as qsvd allocate writes them.")
    ] = None
    explore: Annotated[bool, arg(help="A table of what fits: rank by sequence by card.")] = False
    tflops: Annotated[
        float | None,
        arg(help="Of the card in 16 bits, as it really does them, 10^12 a second; None: measured here, or 100."),
    ] = None
    link: Annotated[float | None, arg(help="Host to card, GB a second; None: measured here, or 25.")] = None
    disk: Annotated[float | None, arg(help="Disk, GB a second; None: 3.")] = None
    json: Annotated[bool, arg(help="Print everything as JSON.")] = False
