"""Measurements of weights that many tests ask for are made once: of equal arguments, all of them."""

import pickle
from contextlib import contextmanager

import pytest
import torch

import qsvd.prepare.allocate
from qsvd.decompose.candidates import measure_candidates
from qsvd.plan.grid import grid_of

_FOUND = {}


def remembered(weight_OI, codecs, ranks, **options):
    """What `measure_candidates` finds; or what it found before for the same numbers, options and seed."""
    numbers = weight_OI.contiguous().view(torch.uint8).numpy().tobytes()
    key = pickle.dumps((numbers, weight_OI.dtype, weight_OI.shape, [*codecs], [*ranks], options))
    if key not in _FOUND:
        _FOUND[key] = measure_candidates(weight_OI, codecs, ranks, **options)
    return _FOUND[key]


def few_candidates(monkeypatch, *ranks, codecs=("nf3-16-3x64", "nf8-128-8x256")):
    """Let commands that are given a budget alone try these."""
    monkeypatch.setattr(qsvd.prepare.allocate, "grid_of", lambda _, __, *rest: grid_of(codecs, ranks, *rest))


@contextmanager
def remembering():
    """While this lasts, commands measure by `remembered`."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(qsvd.prepare.allocate, "measure_candidates", remembered)
        yield
