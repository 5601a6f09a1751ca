"""The device and the compute dtype that options name."""

import torch

from qsvd.errors import BadInput


def device_of(name: str) -> torch.device:
    """Return the device that an option names; "auto" is a GPU if there is one.

    A GPU has an index, since some functions of torch.cuda refuse a device without one. It also becomes the current
    GPU: transformers' trainers compute on that one, whatever device the model is on.

    Raises:
        BadInput: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BadInput(f"--device {name!r} is not one of auto, cpu, cuda, cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise BadInput(f"--device {name!r} is not one of auto, cpu, cuda, cuda:N")
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise BadInput(f"--device {name!r} does not exist: torch finds {count} CUDA GPUs")
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """Return the compute dtype that an option names; "auto" is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def limit_gpu_memory(device: torch.device, limit: int | None) -> None:
    """Let this process take no more than `limit` bytes of a GPU."""
    if limit is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
