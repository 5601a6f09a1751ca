"""The new head of a classifier: drawn as transformers does, float32, trained in full."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qsvd.plan.listing import listing
from qsvd.plan.model import ModelPlan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def classifier(config: "PreTrainedConfig", labels: tuple[str, ...]) -> Any:
    """The class of transformers' sequence classifier for this config, which is told the labels.

    Raises:
        ValueError: there is none for this type of model.
    """
    import transformers

    mapping = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if type(config) not in mapping:
        raise ValueError(f"transformers has no sequence classifier of model type {config.model_type!r}")
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    config.problem_type = "single_label_classification"
    if config.pad_token_id is None:
        config.pad_token_id = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    return mapping[type(config)]


def start_head(model: Any, plan: ModelPlan, *, is_classifier: bool, seed: int) -> tuple[str, ...]:
    """Make the parameters that no file holds, on the device of the others; their names.

    Raises:
        ValueError: parameters are missing that are not a new head's.
    """
    device = next(p.device for p in model.parameters() if not p.is_meta)
    empty = [name for name, p in model.named_parameters() if p.is_meta and name not in plan.tied]
    head = [n for n in empty if is_classifier and not n.startswith(f"{plan.base_prefix}.")]
    missing = sorted(set(empty) - set(head) - plan.optional)
    if missing:
        raise ValueError(f"the base lacks {len(missing)} tensors of {plan.architecture}: {listing(missing)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for path in dict.fromkeys(name.rpartition(".")[0] for name in head):
            module = model.get_submodule(path).to_empty(device="cpu", recurse=False).float()
            model._init_weights(module)
            module.to(device).requires_grad_(True)
    for child in dict.fromkeys(name.partition(".")[0] for name in head):
        model.get_submodule(child).register_forward_pre_hook(_in_float32)
    return tuple(head)


def _in_float32(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
