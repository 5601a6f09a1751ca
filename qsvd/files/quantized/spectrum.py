"""Singular values of stored components, read without torch.

B A = Q_B R_B (Q_A R_A)^T, so that its singular values are those of R_B R_A^T [R, R], R the rank.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsvd.files.workspace import ADAPTER_PREFIX, ADAPTER_TENSORS

if TYPE_CHECKING:
    import numpy as np

MOST_HEADER = 10**8  # bytes
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def kept_values(folder: Path, modules: Sequence[str]) -> dict[str, list[float]]:
    """Return the singular values of B A of these layers of a quantized model, largest first; some may be missing.

    Args:
        folder: A complete quantized model, or one whose adapter is written. Without components nothing is returned.
    """
    path = folder / ADAPTER_TENSORS
    if not path.is_file():
        return {}
    import numpy as np

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: Any = json.loads(file.read(length)) if length <= MOST_HEADER else {}
    found = {}
    for module in modules:
        name = module.removesuffix(".weight")
        entries = [header.get(f"{ADAPTER_PREFIX}{name}.lora_{part}.weight") for part in "AB"]
        if not all(isinstance(entry, dict) and entry.get("dtype") in DTYPES for entry in entries):
            continue
        down_RI, up_OR = (_matrix(path, 8 + length, entry) for entry in entries)
        core_RR = _triangle(up_OR) @ _triangle(down_RI.T).T
        found[module] = [float(value) for value in np.linalg.svd(core_RR, compute_uv=False)]
    return found


def _triangle(tall: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """Return R of the QR factors."""
    import numpy as np

    return np.asarray(np.linalg.qr(tall, mode="r"))


def _matrix(path: Path, start: int, entry: dict[str, Any]) -> "np.ndarray[Any, Any]":
    """Read a matrix as float64."""
    import numpy as np

    first, end = entry["data_offsets"]
    with path.open("rb") as file:
        file.seek(start + first)
        raw = np.frombuffer(file.read(end - first), DTYPES[entry["dtype"]])
    values = (raw.astype(np.uint32) << 16).view(np.float32) if entry["dtype"] == "BF16" else raw
    return values.astype(np.float64).reshape(entry["shape"])
