"""Five weights whose norms come from real matrices, by NumPy."""

from types import SimpleNamespace

import numpy as np
import pytest

from qsvd.records import Coverage, LeftTensors, Norms, WeightError
from qsvd.report.header import ReportHeader

WEIGHTS = [  # name, role, shape, bits, size of the error before and after
    ("layers.0.mlp.down_proj.weight", "down", (6, 9), 4.5, 0.09, 0.07),
    ("layers.0.self_attn.q_proj.weight", "q", (6, 6), 5.25, 0.09, 0.08),
    ("layers.1.self_attn.q_proj.weight", "q", (8, 6), 4.75, 0.1, 0.04),
    ("layers.1.pooler.dense.weight", "other", (4, 12), 4.125, 0.08, 0.095),
    ("layers.1.mlp.down_proj.weight", "down", (5, 9), 6.0, 0.11, 0.09),
]


def norms_of(matrix, nuclear_error):
    values = np.linalg.svd(matrix, compute_uv=False)
    return Norms(float(np.sqrt((values**2).sum())), float(values.sum()), nuclear_error, float(values[0]))


@pytest.fixture(scope="session")
def samples():
    """Matrices W, E before and E after of each weight, and the WeightErrors that hold their norms."""
    random = np.random.default_rng(3)
    matrices, errors = [], []
    for index, (name, role, shape, bits, before, after) in enumerate(WEIGHTS):
        triple = [scale * random.standard_normal(shape) for scale in (1.0, before, after)]
        frobenius = float(np.linalg.norm(triple[0]))
        norms = [norms_of(triple[1], 0.01 * index), norms_of(triple[2], 0.02 * index)]
        errors.append(WeightError(name, role, shape, 2, bits, 3, frobenius, *norms))
        matrices.append(triple)
    return SimpleNamespace(matrices=matrices, errors=errors)


@pytest.fixture(scope="session")
def header():
    left = (LeftTensors("embed_tokens.weight", 1, 1200), LeftTensors("layers.*.norm.weight", 4, 64))
    return ReportHeader("tiny", "nf4", 2, "svd", 5, "quantize", Coverage(5, 231, 1495, left))
