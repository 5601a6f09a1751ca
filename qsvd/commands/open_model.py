"""A model as a user names it: a 16-bit checkpoint, a result of qsvd quantize, or a run of qsvd train."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from qsvd.adapters.install import load
from qsvd.checkpoint.adapter_folder import RECORD, check_base, open_adapter
from qsvd.checkpoint.hub import MODEL_ID, download
from qsvd.checkpoint.read_split import SplitFolder, open_split
from qsvd.checkpoint.write import MANIFEST
from qsvd.plan.listing import first_line, listing
from qsvd.plan.pages import EVERYTHING, Placement

Kind = Literal["16-bit", "split", "trained"]


@dataclass(frozen=True)
class NamedModel:
    """A model that is there, not yet loaded.

    home is the folder of the tokenizer and config.json: the checkpoint or the base. architecture is the class in
    transformers of a result or of a run's base; labels are the classes of a run.
    """

    name: str
    kind: Kind
    home: Path
    architecture: str = ""
    labels: tuple[str, ...] = ()


def find_model(name: str, base: Path | None) -> NamedModel:
    """What a name stands for.

    Args:
        base: Of a run, where it is now; None: where it was when the run was made.

    Raises:
        ValueError: there is no such folder or hub model, it holds nothing that is known, or the run belongs to another
            base.
    """
    folder = Path(name).expanduser()
    if not folder.exists():
        if MODEL_ID.fullmatch(name) and not name.startswith((".", "/", "~")):
            return NamedModel(name, "16-bit", download(name))
        raise ValueError(f"{name} is no folder, and no hub id either")
    if (folder / RECORD).is_file():
        adapter = open_adapter(folder)
        home = base.expanduser() if base is not None else Path(adapter.record.base)
        if not home.is_dir():
            raise ValueError(f"{name} was trained beside {home}, which is not there; give --base where it is now")
        split = open_split(home)
        check_base(adapter, home, split.fingerprint)
        return NamedModel(name, "trained", home, _architecture(split), adapter.record.labels)
    if (folder / MANIFEST).is_file():
        return NamedModel(name, "split", folder, _architecture(open_split(folder)))
    if (folder / "config.json").is_file():
        return NamedModel(name, "16-bit", folder)
    raise ValueError(f"{name} is no checkpoint (config.json), no result of qsvd quantize, and no run of qsvd train")


def _architecture(split: SplitFolder) -> str:
    return split.manifest["source"]["architecture"]


def check_kind(found: NamedModel, *, classifier: bool) -> None:
    """Refuse a result or a run that is no classifier, or no language model, where one is asked for.

    What a 16-bit checkpoint lacks is seen when it is loaded.
    """
    if found.kind == "16-bit":
        return
    is_classifier = bool(found.labels) or found.architecture.endswith("ForSequenceClassification")
    if classifier and not is_classifier:
        raise ValueError(
            f"{found.name} has no classification head, which labelled examples need; give a run trained on labels"
        )
    if not classifier and found.labels:
        raise ValueError(f"{found.name} is a classifier ({listing(found.labels)}), which needs labelled examples")
    if not classifier and found.architecture not in _causal_classes():
        raise ValueError(f"{found.name} is a {found.architecture}, which predicts no next token; give a language model")


def _causal_classes() -> set[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


def load_model(
    found: NamedModel,
    device: torch.device,
    dtype: torch.dtype,
    *,
    classifier: bool = False,
    placement: Placement = EVERYTHING,
) -> Any:
    """The model, in evaluation mode; the placement is for results and runs.

    Raises:
        ValueError: it cannot be built, or is no classifier, or no language model, where one is asked for.
    """
    check_kind(found, classifier=classifier)
    if found.kind == "trained":
        return load(found.home, adapter=found.name, device=device, dtype=dtype, placement=placement)
    if found.kind == "split":
        return load(found.home, device=device, dtype=dtype, placement=placement)
    import transformers

    from qsvd.adapters.quantizer import register

    register()  # a mixed base that transformers saved again
    auto = transformers.AutoModelForSequenceClassification if classifier else transformers.AutoModelForCausalLM
    try:
        loaded: Any = auto.from_pretrained(found.home, dtype=dtype, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"transformers cannot open {found.name}: {first_line(error)}") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):  # transformers draws them at random
        raise ValueError(f"{found.name} lacks {len(missing)} weights of a {type(model).__name__}: {listing(missing)}")
    return model.to(device).eval()
