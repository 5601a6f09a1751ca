"""Quantized models whose codes and components are drawn, not split from a 16-bit model, which takes longer.

For tests of bytes, of loading, and of runs that must not differ from each other: there are no errors of a split.
"""

from contextlib import redirect_stderr
from io import StringIO

import torch
from random_model import random_model, write_16_bit, write_split

import qsvd
from qsvd.commands.demo import MODEL


def drawn_base(out, config, rank, *, seed=0, source=None, files=MODEL, **options):
    """A quantized model of this config.

    Args:
        source: Folder for a 16-bit model that has the same tensors where nothing is split.
        files: Folder of a tokenizer, that of the embedded model.
    """
    model = random_model(out.name, config, seed, torch.device("cpu"), layers_per_shard=100, files=files)
    if source is not None:
        write_16_bit(model, source)
    with redirect_stderr(StringIO()):
        write_split(model, qsvd.Quantize(out.name, out=out, rank=rank, device="cpu", seed=seed, **options))
    return out
