"""Flags of qsvd demo."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg


@dataclass(frozen=True)
class Demo:
    """Quantize the embedded model at several ranks, compare held-out perplexity, and fine-tune it in three ways."""

    out: Annotated[Path, arg(metavar="DIR", help="Where the results go.")] = Path("build/demo")
    ranks: Annotated[tuple[int, ...], arg(help="Ranks to try.")] = (0, 16, 32, 64)
    tokens: Annotated[int, arg(help="Tokens of the held-out text to measure on.")] = 20_000
    epochs: Annotated[float, arg(help="Passes over the fine-tuning text.")] = 2.0
