"""Compare a checkpoint with its config, and refuse quantized models, by names, shapes and dtypes of the tensors."""

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from qsvd.errors import BadInput, listing
from qsvd.files.safetensors import Entry
from qsvd.files.source import Checkpoint
from qsvd.plan.weights import ModelPlan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SPLITTABLE = ("F32", "BF16", "F16")
QUANTIZED_NAMES = {  # checked in this order; no tensor of a 16-bit model has such a name
    "bitsandbytes": re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB)$|\.quant_state\."),
    "GPTQ": re.compile(r"\.g_idx$"),
    "AWQ": re.compile(r"\.(qweight|qzeros)$"),
    "compressed-tensors": re.compile(r"\.weight_packed$"),
    "an 8-bit format": re.compile(r"\.(weight_scale|weight_scale_inv)$"),
}
PACKED_DTYPES = re.compile(r"F8_.*|[UI]\d+")


def check_not_quantized(config: "PreTrainedConfig", tensors: Mapping[str, Entry]) -> None:
    """Refuse a checkpoint that is already quantized.

    Evidence is a quantization_config in the config, tensors with the names of a quantizer, and integer or 8-bit float
    tensors called ".weight".

    Raises:
        BadInput: there is evidence; the sentence names every kind with an example.
    """
    evidence = []
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        evidence.append(f"config.json has a quantization_config with quant_method {method!r}")
    kinds = {kind: [n for n in tensors if pattern.search(n)] for kind, pattern in QUANTIZED_NAMES.items()}
    if kinds["GPTQ"]:
        kinds["AWQ"] = []  # the two share all names but one
    evidence += [f"{len(named)} tensors such as {named[0]} are {kind}'s" for kind, named in kinds.items() if named]
    packed = [n for n, entry in tensors.items() if n.endswith(".weight") and PACKED_DTYPES.fullmatch(entry.dtype)]
    if packed:
        evidence.append(f"{len(packed)} weights such as {packed[0]} are {tensors[packed[0]].dtype}")
    if evidence:
        raise BadInput(
            f"this checkpoint is already quantized: {'; '.join(evidence)}. "
            "qsvd quantizes models in 16 bits, in FP8 with block scales (quant_method fp8, weight_block_size) and in "
            "MXFP4 (gpt-oss); give the model that this one was made from"
        )


def resolve(names: Iterable[str], plan: ModelPlan) -> ModelPlan:
    """Return the plan with the tensor names of the checkpoint, in `spelling` and in the name and sources of weights.

    A checkpoint may have other names than the model: without or with the prefix of the base model, or those of an older
    release (LayerNorm.gamma). transformers renames tensors when it loads them; the same renamings are applied here.

    Args:
        names: Tensor names of the checkpoint. Names that the model does not have become `unknown`.
        plan: From `plan_model`.

    Raises:
        BadInput: two tensors belong to one place in the model, or transformers computes a weight to split from other
            tensors when it loads the model.
    """
    transforms = [copy.copy(transform) for transform in plan.transforms]  # some have state
    spelling: dict[str, str] = {}
    clashes, computed, unknown = [], set(), []
    for name in sorted(names):
        model_name, is_computed = _model_name(name, plan, transforms)
        if model_name not in plan.shapes:
            unknown.append(name)
        if is_computed:
            computed.add(model_name)
        elif spelling.setdefault(model_name, name) != name and model_name in plan.shapes:
            clashes.append(f"{spelling[model_name]} and {name} for {model_name}")
    if clashes:
        raise BadInput(f"the checkpoint has two tensors for one place in {plan.architecture}: {listing(clashes)}")
    fused = [spec.module for spec in plan.weights if f"{spec.module}.weight" in computed]
    if fused:
        raise BadInput(
            f"transformers computes {len(fused)} weights of {plan.architecture} from other tensors on loading "
            f"({listing(fused)}); load the model and save it in the new form, or exclude them"
        )
    weights = []
    for spec in plan.weights:
        sources = tuple(replace(source, tensor=spelling.get(source.tensor, source.tensor)) for source in spec.sources)
        weights.append(replace(spec, name=spelling.get(f"{spec.module}.weight", spec.name), sources=sources))
    known = {model_name: name for model_name, name in spelling.items() if model_name in plan.shapes}
    optional = plan.optional | computed
    return replace(plan, weights=tuple(weights), spelling=known, optional=optional, unknown=tuple(unknown))


def check_complete(checkpoint: Checkpoint, plan: ModelPlan) -> ModelPlan:
    """Check that every tensor of the plan is in the checkpoint; return the plan with its names (see `resolve`).

    Raises:
        BadInput: tensors are missing or have another shape than in the config, or weights to split have another dtype
            than F32, BF16 or F16; the sentence names every kind of fault.
    """
    plan = resolve(checkpoint.tensors, plan)
    present = {name: checkpoint.tensors[spelled] for name, spelled in plan.spelling.items()}
    missing = [name for name in plan.shapes if name not in present and not _may_be_absent(name, plan, present)]
    reshaped = [
        f"{entry.name} is {list(entry.shape)} instead of {list(plan.shapes[name])}"
        for name, entry in present.items()
        if entry.shape != plan.shapes[name]
    ]
    read = dict.fromkeys(source.tensor for spec in plan.weights for source in spec.read_from)
    entries = (checkpoint.tensors[name] for name in read if name in checkpoint.tensors)
    retyped = [f"{entry.name} is {entry.dtype}" for entry in entries if entry.dtype not in SPLITTABLE]
    problems = [
        f"{len(names)} {fault}: {listing(names)}"
        for names, fault in (
            (missing, "tensors that config.json describes are in no weight file"),
            (reshaped, "tensors have another shape than in config.json"),
            (retyped, f"weights to split have another dtype than {', '.join(SPLITTABLE)}"),
        )
        if names
    ]
    if problems:
        raise BadInput(f"{checkpoint.name} is not the {plan.architecture} of its config: {'; '.join(problems)}")
    return plan


def _model_name(name: str, plan: ModelPlan, transforms: list) -> tuple[str, bool]:
    """Return the model's name of a tensor of the checkpoint, and whether transformers computes its values."""
    from transformers.core_model_loading import WeightConverter

    converted = False
    for transform in sorted(transforms, key=lambda transform: isinstance(transform, WeightConverter)):
        if not (converted and isinstance(transform, WeightConverter)):  # renamings chain, but one conversion at most
            name, source = transform.rename_source_key(name)
            converted = converted or (isinstance(transform, WeightConverter) and source is not None)
    prefix = f"{plan.base_prefix}."
    if name.startswith(prefix) and name.removeprefix(prefix) in plan.shapes:
        return name.removeprefix(prefix), converted
    if f"{prefix}{name}" in plan.shapes:
        return f"{prefix}{name}", converted
    return name, converted


def _may_be_absent(name: str, plan: ModelPlan, present: Mapping[str, Entry]) -> bool:
    """Return whether the model needs no tensor of this name: it is optional, or tied to a tensor that is present."""
    if name in plan.optional:
        return True
    source = plan.tied.get(name, name)
    return any(other in present for other in (source, *(target for target, s in plan.tied.items() if s == source)))
