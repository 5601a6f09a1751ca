"""The device, and the dtype to compute in, that flags name."""

import torch


def device_of(name: str) -> torch.device:
    """ "auto" is a GPU if there is one.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name!r} is none of auto, cpu, cuda, cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name!r} is none of auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype that a flag names."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)
