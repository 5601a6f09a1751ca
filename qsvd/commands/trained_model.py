"""What an export starts from, opened: a base and what a run trained beside it, or the base alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.install import load, names_of
from qsvd.adapters.start import new_record, stored_factors, trained_adapter
from qsvd.checkpoint.adapter_folder import AdapterFolder, AdapterRecord, open_adapter
from qsvd.checkpoint.export import Trained, TrainedModel
from qsvd.checkpoint.read_split import SplitFolder, open_split
from qsvd.checkpoint.tensor_file import read_tensor
from qsvd.commands.open_model import find_model


@dataclass(frozen=True)
class Opened:
    """A base, and perhaps a run.

    Args:
        adapter: None: the stored components as they are.
        trained: The same as exports want it.
    """

    split: SplitFolder
    adapter: AdapterFolder | None
    record: AdapterRecord
    trained: TrainedModel

    @property
    def task(self) -> str | None:
        """PEFT's task_type."""
        if self.record.labels:
            return "SEQ_CLS"
        return "CAUSAL_LM" if self.split.manifest["source"]["architecture"].endswith("ForCausalLM") else None

    def load(self) -> Any:
        """The trained model as qsvd runs it, float32 on the CPU."""
        adapter = None if self.adapter is None else self.adapter.folder
        return load(self.split.folder, adapter=adapter, device="cpu", dtype=torch.float32)


def open_trained(run: Path, base: Path | None) -> Opened:
    """Open a run with its base, or a base.

    Raises:
        ValueError: the folder is neither, or the base is not there or another one.
    """
    if not run.expanduser().exists():  # a hub id would be downloaded, and then refused
        raise ValueError(f"no folder {run} here; give a run of qsvd train, or a result of qsvd quantize")
    found = find_model(str(run), base)
    if found.kind == "16-bit":
        raise ValueError(f"{run} is a 16-bit checkpoint; give a run of qsvd train, or a result of qsvd quantize")
    split = open_split(found.home)
    if found.kind == "split":
        return Opened(split, None, new_record(split, AdapterOptions()), TrainedModel(split, _stored(split)))
    adapter = open_adapter(run.expanduser())
    spelling = names_of(split, adapter.record).spelling
    modules = {name: path.removesuffix(".weight") for path, name in spelling.items()}

    def weight(name: str) -> Trained:
        made = trained_adapter(split, adapter, name, modules[name])
        up_OK, down_KI = made.factors()
        return Trained(up_OK.float(), down_KI.float(), made.gain())

    full = {name: read_tensor(adapter.tensors[name]) for name in adapter.record.full}
    return Opened(split, adapter, adapter.record, TrainedModel(split, weight, full, spelling))


def _stored(split: SplitFolder) -> Any:
    def weight(name: str) -> Trained:
        up_OR, down_RI = stored_factors(split, name)
        return Trained(up_OR.float(), down_RI.float())

    return weight
