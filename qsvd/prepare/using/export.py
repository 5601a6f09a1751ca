"""What `qsvd export` needs besides the run: the 16-bit model, also one that was pruned."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from qsvd.adapters.load import classifier
from qsvd.errors import BadInput
from qsvd.export.pruned import PrunedRecord, check_fits, read_pruned
from qsvd.export.recovered import change
from qsvd.files.source import Checkpoint, open_checkpoint, read_config
from qsvd.inputs.model_files import MODEL, from_folder
from qsvd.prepare.models import Opened


@dataclass(frozen=True)
class Recovery:
    """The model that was pruned, and what was removed from it."""

    original: Checkpoint
    pruned: PrunedRecord

    @property
    def elements(self) -> int:
        """Numbers in the model."""
        return sum(entry.num_bytes // 2 for entry in self.original.tensors.values())


def find_recovery(opened: Opened, original: str | None) -> Recovery | None:
    """Return what an export for --original MODEL needs if it was pruned for this run; None if it was not.

    Raises:
        BadInput: the run is on a pruned model, and MODEL is neither that nor the one it was made from.
    """
    pruned = None if original is None else read_pruned(opened.split.folder)
    if original is None or pruned is None:
        return None
    found, source = open_checkpoint(original), opened.split.manifest["source"]
    if found.fingerprint == source["fingerprint"]:
        return None
    if found.fingerprint != pruned.fingerprint:
        raise BadInput(
            f"--original {original} is neither {pruned.original}, which qsvd prune removed channels from, nor "
            f"{source['model']}, which is the result: its fingerprint differs; give one of them, unchanged"
        )
    check_fits(pruned, opened.split)
    return Recovery(found, pruned)


def from_transformers(opened: Opened, folder: Path) -> Any:
    """Return a 16-bit model as transformers itself loads it in float32, with a new head for the classes of the run."""
    config: Any = read_config(folder)
    if getattr(config, "quantization_config", None) is not None:  # published in FP8 or MXFP4
        config.quantization_config["dequantize"] = True
    labels, name = opened.record.labels, opened.split.manifest["source"]["architecture"]
    loader = classifier(config, labels, folder) if labels else getattr(transformers, name)
    return from_folder(loader, folder, MODEL, config=config, dtype=torch.float32).eval()


@torch.no_grad()
def recovered(opened: Opened, recovery: Recovery) -> Any:
    """Return the original with the trained change, in float32, by its definition: W + (W' - Q - B0 A0)."""
    assert recovery.original.folder is not None, "it was opened from files"
    model = from_transformers(opened, recovery.original.folder)
    for name, path in opened.trained.modules().items():
        model.get_submodule(path).weight.add_(change(opened.trained, recovery.pruned, name))
    for name, tensor in opened.trained.full.items():
        model.get_parameter(name).copy_(tensor)
    return model
