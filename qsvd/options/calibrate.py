"""Flags of qsvd calibrate."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Calibrate:
    """Measure on examples which numbers of the weights matter: second moments of gradients, and traces of the Hessian.

    A language model takes texts, chats or completions, a classifier labelled texts. One block is in memory at a time.
    """

    model: Annotated[Positional[str], arg(metavar="MODEL", help="Folder of a 16-bit checkpoint, or a hub id.")]
    data: Annotated[Positional[str], arg(metavar="DATA", help="Examples, as qsvd train takes them.")]
    out: Annotated[Path, arg(metavar="FILE", help="Result; a killed run with the same options goes on there.")]
    examples: Annotated[int, arg(help="How many to use, drawn by --seed where there are more.")] = 128
    max_length: Annotated[
        int | None,
        arg(help="Tokens of an example; longer ones are cut, longer texts divided. None: the context, 1024 at most."),
    ] = None
    traces: Annotated[int, arg(help="Random probes of the Hessian for each example; 0 leaves traces out.")] = 0
    loss_on: Annotated[Literal["answers", "all"], arg(help="Tokens that count, where there are answers.")] = "answers"
    map: Annotated[
        tuple[str, ...], arg(metavar="COLUMN=NAME ...", help="Columns of the file under the names qsvd knows.")
    ] = ()
    split: Annotated[str, arg(help="Of a hub data set or a folder.")] = "train"
    include: Annotated[
        tuple[str, ...], arg(metavar="GLOB ...", help="Only modules that match, as in qsvd quantize.")
    ] = ()
    exclude: Annotated[tuple[str, ...], arg(metavar="GLOB ...", help="Leave modules that match out.")] = ()
    chunk: Annotated[
        int | None,
        arg(help="Examples for which the weights are read twice; the result is the same. None: what memory allows."),
    ] = None
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"], arg(help="To compute in; auto is bfloat16 on a GPU, float32 on a CPU.")
    ] = "auto"
    device: Annotated[str, arg(help="auto (a GPU if there is one), cpu, cuda, cuda:1.")] = "auto"
    seed: Annotated[int, arg(help="Of the examples that are drawn, and of the probes.")] = 0
