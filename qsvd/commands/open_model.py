"""A model as a user names it: a 16-bit checkpoint, a result of qsvd quantize, or a run of qsvd train."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from qsvd.adapters.install import load
from qsvd.checkpoint.adapter_folder import RECORD, check_base, open_adapter
from qsvd.checkpoint.hub import MODEL_ID
from qsvd.checkpoint.read_split import open_split
from qsvd.checkpoint.write import MANIFEST
from qsvd.plan.listing import first_line

Kind = Literal["16-bit", "split", "trained"]


@dataclass(frozen=True)
class NamedModel:
    """A model that is there, not yet loaded.

    home is where the tokenizer and config.json are: the checkpoint or the base, a folder or a hub id.
    """

    name: str
    kind: Kind
    home: str
    labels: tuple[str, ...] = ()


def find_model(name: str, base: Path | None) -> NamedModel:
    """What a name stands for.

    Args:
        base: Of a run, where it is now; None: where it was when the run was made.

    Raises:
        ValueError: there is no such folder, it holds nothing that is known, or the run belongs to another base.
    """
    folder = Path(name).expanduser()
    if not folder.exists():
        if MODEL_ID.fullmatch(name) and not name.startswith((".", "/", "~")):
            return NamedModel(name, "16-bit", name)
        raise ValueError(f"{name} is no folder, and no hub id either")
    if (folder / RECORD).is_file():
        adapter = open_adapter(folder)
        home = base.expanduser() if base is not None else Path(adapter.record.base)
        if not home.is_dir():
            raise ValueError(f"{name} was trained beside {home}, which is not there; give --base where it is now")
        check_base(adapter, home, open_split(home).fingerprint)
        return NamedModel(name, "trained", str(home), adapter.record.labels)
    if (folder / MANIFEST).is_file():
        return NamedModel(name, "split", str(folder))
    if (folder / "config.json").is_file():
        return NamedModel(name, "16-bit", str(folder))
    raise ValueError(f"{name} is no checkpoint (config.json), no result of qsvd quantize, and no run of qsvd train")


def load_model(found: NamedModel, device: torch.device, dtype: torch.dtype, *, classifier: bool = False) -> Any:
    """The model, in evaluation mode.

    Raises:
        ValueError: it cannot be built, or is no classifier where one is asked for.
    """
    if classifier and found.kind == "split":
        raise ValueError(f"{found.name} is a base without a classification head; give a run that was trained on labels")
    if found.kind == "trained":
        return load(found.home, adapter=found.name, device=device, dtype=dtype)
    if found.kind == "split":
        return load(found.home, device=device, dtype=dtype)
    import transformers

    auto = transformers.AutoModelForSequenceClassification if classifier else transformers.AutoModelForCausalLM
    home = Path(found.home).expanduser()
    try:
        model: Any = auto.from_pretrained(home if home.is_dir() else found.home, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(f"transformers cannot open {found.name}: {first_line(error)}") from error
    return model.to(device).eval()


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype that a flag names."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)
