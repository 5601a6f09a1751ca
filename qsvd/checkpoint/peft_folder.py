"""What every PEFT folder needs besides its factors: the config, and modules that are saved whole."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from qsvd.checkpoint.export import TrainedModel
from qsvd.checkpoint.export_folder import ExportFolder
from qsvd.checkpoint.layout import ADAPTER_PREFIX, adapter_config
from qsvd.checkpoint.tensor_file import DTYPE_NAMES, NewTensor, TensorEntry, write_stream
from qsvd.checkpoint.whole_file import write_text
from qsvd.checkpoint.write import PYTORCH, to_json
from qsvd.plan.listing import listing

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
HEADS = {  # task -> ends of the paths of modules that PEFT itself expects whole in the file
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def adapter_settings(ranks: Mapping[str, int], kept: Sequence[str], task: str | None, base: str) -> dict[str, Any]:
    """The adapter_config.json; lora_alpha is the rank of each weight, so that every scale is 1.

    Args:
        ranks: Module path -> rank, from 1.
        kept: Paths for modules_to_save.
        task: PEFT's task_type, or None.
        base: Where a loader finds the base.
    """
    rank = max(ranks.values())
    pattern = {f"^{re.escape(module)}": other for module, other in ranks.items() if other != rank}
    config = adapter_config(list(ranks), rank, task, base)
    return config | {"rank_pattern": pattern, "alpha_pattern": pattern, "modules_to_save": list(kept) or None}


def kept_modules(model: TrainedModel, task: str | None) -> tuple[tuple[str, ...], list[NewTensor]]:
    """Paths of the modules that PEFT saves whole, and their tensors: trained ones, and from the base what was not.

    Raises:
        ValueError: PEFT expects a head for the task, and there is none; or it cannot save a parameter that was trained
            in full.
    """
    heads = HEADS.get(task or "", ())
    spelled = {name: model_name for model_name, name in model.spelling.items()}
    base = {spelled.get(name, name): entry for name, entry in model.others().items()}
    kept = {path for name in base if (path := _module(name, heads)).endswith(heads)}
    kept |= {_module(name, heads) for name in model.full}
    _check_saveable(model, kept)
    if heads and not any(path.endswith(heads) for path in kept):
        raise ValueError(
            f"PEFT loads a {task} adapter only with a module {' or '.join(heads)} inside, and neither "
            f"{model.split.folder} nor what was trained in full has one; give the trained head, or task None"
        )
    whole: dict[str, Tensor | TensorEntry] = {**base, **model.full}
    inside = [name for name in whole if any(name.startswith(f"{path}.") for path in kept)]
    return tuple(sorted(kept)), [_whole(name, whole[name]) for name in sorted(inside)]


def write_adapter_files(
    export: ExportFolder, new: Sequence[NewTensor], config: Mapping[str, Any], metadata: Mapping[str, str]
) -> None:
    """The two files of a PEFT folder, the config last: where it is, the adapter is whole."""
    write_stream(export.folder / TENSORS, new, PYTORCH | dict(metadata))
    write_text(export.folder / CONFIG, to_json(config))


def _module(name: str, heads: tuple[str, ...]) -> str:
    """The module that a parameter is saved with: the head it is in, or else its own."""
    owner = name.rpartition(".")[0]
    parts = owner.split(".")
    paths = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return next((path for path in paths if path.endswith(heads)), owner)


def _check_saveable(model: TrainedModel, kept: set[str]) -> None:
    """Refuse modules that are split themselves or have split weights inside, and the whole model."""
    split = model.modules().values()
    refused = [path for path in sorted(kept) if not path or any(f"{other}.".startswith(f"{path}.") for other in split)]
    if refused:
        raise ValueError(
            f"PEFT saves modules whole, and {listing([path or 'the whole model' for path in refused])} would be one, "
            "with split weights inside; export merged weights instead"
        )


def _whole(name: str, source: Tensor | TensorEntry) -> NewTensor:
    dtype = source.dtype if isinstance(source, TensorEntry) else DTYPE_NAMES[source.dtype]
    return NewTensor(f"{ADAPTER_PREFIX}{name}", dtype, tuple(source.shape), source)
