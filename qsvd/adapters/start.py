"""Which adapter, and the adapter of each weight before its first step."""

import hashlib

import torch
from torch import Tensor

from qsvd.adapters.adapter import FEW, Adapter, AdapterOptions, Principal, chosen
from qsvd.adapters.methods import METHODS, default_method, kind_of
from qsvd.checkpoint.adapter_folder import AdapterFolder, AdapterRecord
from qsvd.checkpoint.read_split import SplitFolder
from qsvd.checkpoint.tensor_file import read_tensor


def new_record(split: SplitFolder, options: AdapterOptions, labels: tuple[str, ...] = ()) -> AdapterRecord:
    """The record of a new adapter, on disk as in memory.

    Raises:
        ValueError: the method or the dtype is unknown, or there is only one label.
    """
    method = options.method
    if method is None:
        method = default_method(split.ranks.values())
    check_method(method)
    if len(labels) == 1:
        raise ValueError(f"labels has the one class {labels[0]!r}; a classifier needs at least two")
    return AdapterRecord(
        base=str(split.folder.resolve()),
        fingerprint=split.fingerprint,
        method=method,
        rank=options.rank,
        alpha=options.alpha,
        dtype=_dtype_name(split, method, options),
        seed=options.seed,
        labels=labels,
    )


def check_method(method: str) -> None:
    """Refuse a method that there is not."""
    if method not in METHODS:
        raise ValueError(f"method {method!r} is none of {', '.join(METHODS)}")


def _dtype_name(split: SplitFolder, method: str, options: AdapterOptions) -> str:
    """Of the trained parameters: as told, or float32 while they are few."""
    if options.dtype in ("float32", "bfloat16"):
        return options.dtype
    if options.dtype != "auto":
        raise ValueError(f"adapter dtype {options.dtype!r} is none of auto, float32, bfloat16")
    count = 0
    for name, weight in split.weights.items():
        kind = kind_of(method, split.ranks[name], split.ranks.values())
        rank, _ = chosen(options, kind.defaults, weight["rank"])
        count += kind.num_parameters(tuple(weight["shape"]), rank)
    return "float32" if count <= FEW else "bfloat16"


def start_adapter(split: SplitFolder, record: AdapterRecord, name: str, device: torch.device) -> Adapter:
    """The adapter of one weight before its first step.

    Args:
        name: Of the weight's tensor in the base.

    Raises:
        ValueError: the method cannot start from the weight's factors; the sentence names the weight.
    """
    return start_from(read_principal(split, name, device, record.method), split, record, name)


def read_principal(
    split: SplitFolder, name: str, device: torch.device, method: str, *, is_paged: bool = False
) -> Principal:
    """One weight as it is stored, read once.

    Args:
        is_paged: Leave the residual in its file, unless the method starts from its values.
    """
    up_OR, down_RI = stored_factors(split, name)
    kind = kind_of(method, split.ranks[name], split.ranks.values())
    if is_paged and not kind.starts_from_residual:
        residual = split.residual(name, mapped=True)
    else:
        residual = split.residual(name).to(device)
    return Principal(residual, up_OR.to(device), down_RI.to(device))


def stored_factors(split: SplitFolder, name: str) -> tuple[Tensor, Tensor]:
    """B [O, R] and A [R, I] of one weight; R is 0 where nothing but the residual is stored."""
    rows, columns = split.weights[name]["shape"]
    return split.factors(name) or (torch.zeros(rows, 0), torch.zeros(0, columns))


def start_from(principal: Principal, split: SplitFolder, record: AdapterRecord, name: str) -> Adapter:
    """As `start_adapter`, of a weight that is read already."""
    options = AdapterOptions(record.method, record.rank, record.alpha, record.dtype, record.seed)
    digest = hashlib.sha256(f"{record.seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:6]))
    try:
        return kind_of(record.method, principal.rank, split.ranks.values()).start(principal, options, generator)
    except ValueError as error:
        raise ValueError(f"{split.folder}: {name}: {error}") from error


def trained_adapter(split: SplitFolder, adapter: AdapterFolder, name: str, module: str) -> Adapter:
    """The adapter of one weight as it was saved, on the CPU.

    Args:
        name: Of the weight's tensor in the base.
        module: Path of its module in the trained model.

    Raises:
        ValueError: the folder lacks parameters of it.
    """
    made = start_adapter(split, adapter.record, name, torch.device("cpu")).requires_grad_(False)
    missing = [f"{module}.{part}" for part, _ in made.named_parameters() if f"{module}.{part}" not in adapter.tensors]
    if missing:
        raise ValueError(f"{adapter.folder} lacks {', '.join(missing)}")
    for part, parameter in made.named_parameters():
        parameter.copy_(read_tensor(adapter.tensors[f"{module}.{part}"]))
    return made
