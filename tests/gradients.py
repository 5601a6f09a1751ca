"""A file of gradients as `qsvd calibrate --gradient-rank` writes it, made up, by the safetensors library."""

import json

import numpy as np
import safetensors.torch
import torch

from tests import reference


def vectors(shape, rank, *, seed=0):
    """Orthonormal left [O, 2 K] and right [K, I] vectors, float32; K is at most half of the smaller side."""
    rank = min(rank, min(shape) // 2)
    left, right = (np.linalg.qr(reference.gaussian(side, 2 * rank, seed=seed + side))[0] for side in shape)
    return torch.from_numpy(left.copy()), torch.from_numpy(right[:, :rank].T.copy())


def write_gradients(base, file, rank, *, fingerprint=None, leave_out=()):
    """Write gradients for the quantized model in `base`; return the file."""
    manifest, tensors = json.loads((base / "qsvd.json").read_text()), {}
    for number, weight in enumerate(manifest["weights"].values()):
        module, shape = weight["module"], weight["shape"]
        left, right = vectors(shape, rank, seed=10 * number)
        tensors |= {f"{module}.rows": torch.ones(shape[0]), f"{module}.columns": torch.ones(shape[1])}
        if rank and module not in leave_out:
            tensors |= {f"{module}.gradient_left": left, f"{module}.gradient_right": right}
    record = json.dumps({"model": "the/model", "run": {"rank": rank}})
    metadata = {"format": "qsvd statistics 1", "fingerprint": fingerprint or manifest["source"]["fingerprint"]}
    safetensors.torch.save_file(tensors, file, metadata | {"record": record})
    return file
