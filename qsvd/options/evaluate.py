"""Flags of qsvd eval."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Eval:
    """Measure models on one data set: 16-bit checkpoints, results of qsvd quantize, runs of qsvd train."""

    models: Annotated[
        Positional[tuple[str, ...]], arg(metavar="MODEL ...", help="Folders of any of the three, or a hub id (16-bit).")
    ]
    data: Annotated[str, arg(metavar="DATA", help="A text, or examples as qsvd train takes them.")]
    task: Annotated[
        Literal["auto", "perplexity", "accuracy", "exact-match"],
        arg(help="auto: accuracy for labels, exact-match for answers with ####, else perplexity."),
    ] = "auto"
    reference: Annotated[
        str | None, arg(metavar="MODEL", help="The 16-bit model, for KL divergence and top-token agreement.")
    ] = None
    window: Annotated[int | None, arg(help="Tokens the model sees at once; None: its context, 2048 at most.")] = None
    stride: Annotated[int | None, arg(help="Tokens from window to window of one text; None: half a window.")] = None
    limit: Annotated[int | None, arg(help="Examples to use, from the first; None: all.")] = None
    batch_size: Annotated[int, arg(help="Sequences that go through a model together.")] = 8
    max_new_tokens: Annotated[
        int | None, arg(help="Tokens after which an answer is cut; None: 512, or what the context leaves.")
    ] = None
    map: Annotated[
        tuple[str, ...], arg(metavar="COLUMN=NAME ...", help="Columns of the file under the names qsvd knows.")
    ] = ()
    split: Annotated[str, arg(help="Of a hub data set or a folder.")] = "train"
    base: Annotated[Path | None, arg(metavar="DIR", help="Base of the runs, if it has moved.")] = None
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"], arg(help="To compute in; auto is bfloat16 on a GPU, float32 on a CPU.")
    ] = "auto"
    resident: Annotated[
        Literal["auto"] | float,
        arg(help="Share of blocks whose 4-bit weights stay on the device, 0 to 1; others visit it. auto: what fits."),
    ] = "auto"
    device: Annotated[str, arg(help="auto (a GPU if there is one), cpu, cuda, cuda:1.")] = "auto"
    json: Annotated[bool, arg(help="Print everything as JSON.")] = False
