"""The device and the compute dtype that options name, and the CPU memory that is free."""

import ctypes
import os
from pathlib import Path, PurePosixPath

import psutil
import torch

from qsvd import ranks
from qsvd.errors import BadInput

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
PLENTY = 1 << 30  # bytes that are free
ROOT = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


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
    count, index = torch.cuda.device_count(), device.index
    if (index or 0) >= count:
        raise BadInput(f"--device {name!r} does not exist: torch finds {count} CUDA GPUs")
    if ranks.size() > 1:
        check_own_gpu(index, count)
        index = ranks.local_rank()
    elif index is None:
        index = torch.cuda.current_device()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def check_own_gpu(index: int | None, count: int) -> None:
    """Refuse a GPU that several processes would use.

    Args:
        index: Of the GPU that was asked for, or None.
        count: GPUs of this machine.
    """
    own = ranks.local_rank()
    if index not in (None, own):
        raise BadInput(
            f"--device cuda:{index} is one GPU, and each process of torchrun has its own; give --device cuda"
        )
    if own >= count:
        raise BadInput(
            f"process {own + 1} of this machine has no GPU of its own: torch finds {count}; give torchrun "
            f"--nproc-per-node {count}"
        )


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


def free_host_memory() -> int:
    """Return the bytes that this process can still use: those of the system, or those below its cgroup's limit.

    Of several processes on a machine each has an equal share.
    """
    free = min(psutil.virtual_memory().available, *(_left(group) for group in _groups()), 2**63)
    return free // ranks.local_size()


def taken_host_memory() -> int:
    """Return the resident bytes of this process."""
    return psutil.Process().memory_info().rss


def trim_freed_memory() -> None:
    """Tell glibc to return every large block that is freed to the system; for the time when a model is made.

    By default glibc raises the size from which it does so with every freed block, up to 32 MB. The blocks that a model
    allocates and frees before its weights are loaded would then leave gaps of some GB.
    """
    _set_malloc(mapped=1 << 20, trimmed=1 << 20)


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks up to its usual sizes, if much memory is free; for the time of training.

    Parts of weights are decoded and freed all the time. Asking the system for each costs a third of a CPU's speed.
    """
    if free_host_memory() >= PLENTY:
        _set_malloc(mapped=1 << 25, trimmed=1 << 26)


def _set_malloc(*, mapped: int, trimmed: int) -> None:
    """Set the sizes, unless the user has set them or the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt(M_MMAP_THRESHOLD, mapped)
        mallopt(M_TRIM_THRESHOLD, trimmed)


def _groups() -> list[Path]:
    """Return the control groups that may limit the memory of this process: its own and their parents."""
    lines = OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.is_file() else []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):  # version 2 has one group for all controllers
            root = ROOT / controllers
            own = PurePosixPath(path.lstrip("/"))
            folders += [root / own, *(root / parent for parent in own.parents)]
    return folders


def _left(group: Path) -> int:
    """Return limit less usage. The cache of files on disk does not count as used: the system drops it when needed."""
    for limit, usage, cache, shared in (
        ("memory.max", "memory.current", "file", "shmem"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", "total_shmem"),
    ):
        if (group / limit).is_file() and (text := (group / limit).read_text().strip()) != "max":
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            files = int(stat.get(cache, 0)) - int(stat.get(shared, 0))  # the cache includes files in memory (tmpfs)
            return max(int(text) - int((group / usage).read_text()) + files, 0)
    return 2**63
