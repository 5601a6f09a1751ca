"""Find the linear weights to split, by name, shape and role, from a config; the model is built on the meta device.

qsvd splits every linear layer inside the repeated blocks, also transformers' Conv1D and every expert of a stack. Some
stay in 16 bits by a rule (rules.py). Other weights of a block are refused, never silently left. All else stays as is.
"""

import copy
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qsvd.errors import BadInput, first_line, listing
from qsvd.plan.experts import Stack, stacks_of
from qsvd.plan.language import is_in, towers
from qsvd.plan.rules import GROUPED, is_grouped, is_linear, is_replaced_by_bitsandbytes, is_transposed, left_by_rule
from qsvd.plan.targets import LAST, is_expert
from qsvd.records import Coverage, LeftTensors, Role

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.core_model_loading import WeightTransform

UNSPLITTABLE = "3-D"  # several matrices in one tensor that are not a stack of experts
POSITIONS = ("max_position_embeddings", "max_seq_len", "max_target_positions")  # names in configs
BUILD_ERRORS = (ValueError, TypeError, LookupError, AttributeError, ImportError, RuntimeError, ArithmeticError, OSError)
ROLE_BY_NAME: dict[str, Role] = {  # the last part of a path in transformers -> what the layer does in its block
    **dict.fromkeys(("q_proj", "query", "query_proj", "q_lin", "q", "q_a_proj", "q_b_proj"), "q"),
    **dict.fromkeys(("k_proj", "key", "key_proj", "k_lin", "k"), "k"),
    **dict.fromkeys(("v_proj", "value", "value_proj", "v_lin", "v"), "v"),
    **dict.fromkeys(("o_proj", "out_proj", "out_lin", "o"), "o"),
    **dict.fromkeys(("gate_proj", "w1", "wi_0"), "gate"),
    **dict.fromkeys(("up_proj", "w3", "wi", "wi_1", "fc1", "fc_in", "lin1", "c_fc", "dense_h_to_4h", "ffn"), "up"),
    **dict.fromkeys(("down_proj", "w2", "fc2", "fc_out", "lin2", "dense_4h_to_h", "ffn_output"), "down"),
}


@dataclass(frozen=True)
class Source:
    """A part of a tensor of the checkpoint that a weight is read from; by default the whole tensor."""

    tensor: str  # name in the checkpoint
    index: int | None = None  # of the matrix in a 3-D stack
    rows: tuple[int, int] | None = None  # first row and the row after the last
    is_transposed: bool = False  # whether the part is the weight's transpose


@dataclass(frozen=True)
class WeightSpec:
    """One weight to split, y = x W^T: that of a linear layer, or one expert of a stack.

    The module of an expert, "model.layers.0.mlp.experts.down_proj.3", is there once the model is loaded by qsvd.
    """

    name: str  # tensor in the checkpoint, "model.layers.0.self_attn.q_proj.weight"
    module: str  # path in the transformers model, "model.layers.0.self_attn.q_proj"
    shape: tuple[int, int]  # (out features, in features)
    role: Role
    layer: int  # index of the block
    sources: tuple[Source, ...] = ()  # whose rows, one after another, make the weight; empty: the tensor of its name
    stack: str = ""  # path of the parameter that holds all experts of the layer; empty for a linear layer
    is_tower: bool = False  # whether it belongs to an encoder of images or sound, which stays frozen in training
    is_plain: bool = True  # whether transformers puts bitsandbytes' layer in the place of its module, if it has one

    @property
    def place(self) -> str:
        """The parameter of the model that holds the weight."""
        return self.stack or f"{self.module}.weight"

    @property
    def group(self) -> str:
        """What gets one codec and one rank in an allocation: the stack of an expert, or the layer."""
        return self.stack or self.module

    @property
    def read_from(self) -> tuple[Source, ...]:
        return self.sources or (Source(self.name),)


@dataclass(frozen=True)
class ModelPlan:
    """The tensors of a model, and the weights to split. Tensor names are the model's own, except `WeightSpec.name`."""

    architecture: str  # class name in transformers
    weights: tuple[WeightSpec, ...]  # to split, in model order
    left_linears: tuple[str, ...]  # paths of every other linear layer: bitsandbytes' llm_int8_skip_modules
    reasons: Mapping[str, str]  # path -> why a linear layer of the blocks is not split
    shapes: dict[str, tuple[int, ...]]  # every parameter and persistent buffer
    tied: dict[str, str]  # name -> the name it shares its tensor with; one of the two may be absent from a checkpoint
    optional: frozenset[str]  # untied names that transformers does without
    base_prefix: str  # "model": the prefix that a checkpoint of the bare model lacks
    spelling: dict[str, str] = field(default_factory=dict)  # model name -> name in the checkpoint; filled by `resolve`
    unknown: tuple[str, ...] = ()  # tensors of the checkpoint that the class does not have; filled by `resolve`
    transforms: tuple["WeightTransform", ...] = field(default=(), repr=False, compare=False)  # transformers' renamings
    model: "PreTrainedModel | None" = field(default=None, repr=False, compare=False)  # without memory
    conversions: tuple[Any, ...] = field(default=(), repr=False, compare=False)  # plan/conversions.py; by `resolve`


EXCLUDED = "excluded"


def plan_model(
    config: "PreTrainedConfig",
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    include_towers: bool = False,
) -> ModelPlan:
    """Return the plan of the model that a config describes.

    Args:
        config: Its first architecture names the class; without one, AutoModelForCausalLM, then AutoModel choose.
        include: Glob patterns on module paths ("*.self_attn.*"); only layers that match one are split. Empty: all.
        exclude: Glob patterns on module paths; layers that match one stay in 16 bits.
        include_towers: Whether encoders of images and sound are split, too.

    Raises:
        BadInput: no class can be built from the config; a pattern matches nothing; a wanted weight of a block is of a
            kind that cannot be split; nothing is left to split.
    """
    kinds = _block_weights(model := build(config))
    _check_patterns((*include, *exclude), list(kinds))
    linears = {path: module for path, module in model.named_modules() if is_linear(module)}
    blocks = {path: linears[path] for path in kinds if path in linears}
    reasons = left_by_rule(model, blocks, include_towers=include_towers)
    reasons |= {path: kind for path, kind in kinds.items() if kind == GROUPED}
    wanted = {path for path in kinds if path not in reasons and _is_wanted(path, include, exclude)}
    _refuse_unsplittable([path for path, kind in kinds.items() if path in wanted and kind == UNSPLITTABLE])
    stacks = {stack.path: stack for path, module in model.named_modules() for stack in stacks_of(path, module)}
    outside = towers(model)
    weights = tuple(
        replace(spec, is_tower=is_in(path, outside))
        for path in kinds
        if path in wanted
        for spec in (_experts(stacks[path]) if path in stacks else [_spec(path, linears[path])])
    )
    if not weights:
        raise _nothing_left(model, reasons)
    left = tuple(path for path in linears if path not in wanted)
    why = {path: reasons.get(path, EXCLUDED) for path in left if path in blocks}
    why |= {path.removesuffix(".weight"): reason for path, reason in reasons.items() if reason == GROUPED}
    return replace(describe(model), weights=weights, left_linears=left, reasons=why)


def _nothing_left(model: "PreTrainedModel", reasons: Mapping[str, str]) -> BadInput:
    counts = Counter(reasons.values())
    why = listing([f"{count} ({reason})" for reason, count in counts.items()])
    return BadInput(
        f"{type(model).__name__} has no linear layer inside repeated blocks left to split; give another model or "
        f"other patterns{f'. These stay in 16 bits: {why}' if why else ''}"
    )


def unsplittable(config: "PreTrainedConfig") -> tuple[str, ...]:
    """Return the paths that plan_model refuses unless they are excluded."""
    return tuple(path for path, kind in _block_weights(build(config)).items() if kind == UNSPLITTABLE)


def describe(model: "PreTrainedModel") -> ModelPlan:
    """Return the names and shapes of the tensors of a model, without weights to split."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    patterns = model._keys_to_ignore_on_load_missing or ()
    unsaved = set(model._keys_to_ignore_on_save or ())
    return ModelPlan(
        architecture=type(model).__name__,
        weights=(),
        left_linears=(),
        reasons={},
        shapes=shapes,
        tied=dict(model.all_tied_weights_keys),
        optional=frozenset(name for name in shapes if name in unsaved or any(re.search(p, name) for p in patterns)),
        base_prefix=model.base_model_prefix,
        transforms=tuple(get_model_conversion_mapping(model)),
        model=model,
    )


def context_length(config: "PreTrainedConfig", unlimited: int = sys.maxsize) -> int:
    """Return the number of tokens that a model can read at once; `unlimited` for a recurrent model."""
    text = config.get_text_config()
    return next((found for name in POSITIONS if (found := getattr(text, name, None))), unlimited)


def is_classifier(architecture: str) -> bool:
    """Return whether a class of transformers classifies sequences."""
    return architecture.endswith("ForSequenceClassification")


def writers() -> set[str]:
    """Return the classes in transformers that write text; some read images or sound, too."""
    from transformers.models.auto import modeling_auto as auto

    names = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    )
    found = [value for table in names for value in table.values()]
    return {name for value in found for name in ((value,) if isinstance(value, str) else value)}


def coverage(plan: ModelPlan, unknown: Mapping[str, Sequence[int]] | None = None) -> Coverage:
    """Count what the plan splits, and group what it leaves.

    Args:
        unknown: Shapes of the tensors of the checkpoint that the class does not have.
    """
    split = Counter[str]()
    for spec in plan.weights:
        split[spec.place] += math.prod(spec.shape)
    rest = {name: shape for name, shape in plan.shapes.items() if name not in split and name not in plan.tied}
    left = _grouped(rest.items(), plan.reasons)
    elements_split = sum(split.values())
    elements = elements_split + sum(tensors.elements for tensors in left)
    return Coverage(len(plan.weights), elements_split, elements, left, _grouped((unknown or {}).items()))


def _grouped(
    tensors: Iterable[tuple[str, Sequence[int]]], reasons: Mapping[str, str] = MappingProxyType({})
) -> tuple[LeftTensors, ...]:
    """Count tensors whose names differ in their numbers only, largest first; a number that all share stays."""
    groups: dict[tuple[str, str], list[tuple[list[str], int]]] = {}
    for name, shape in tensors:
        key = re.sub(r"(?<=\.)\d+(?=\.)", "*", name), reasons.get(name.removesuffix(".weight"), "")
        groups.setdefault(key, []).append((name.split("."), math.prod(shape)))
    counted = []
    for (_, reason), members in groups.items():
        parts = zip(*(path for path, _ in members), strict=True)
        pattern = ".".join(part[0] if len({*part}) == 1 else "*" for part in parts)
        counted.append(LeftTensors(pattern, len(members), sum(size for _, size in members), reason))
    return tuple(sorted(counted, key=lambda group: -group.elements))


def build(config: "PreTrainedConfig") -> "PreTrainedModel":
    """Build the class that the config names on the meta device, without memory.

    Raises:
        BadInput: transformers has no such class, or cannot build it from this config.
    """
    import transformers
    from transformers.initialization import no_init_weights

    named = (config.architectures or [""])[0]
    found: Any = getattr(transformers, named, None) if named else None
    config = copy.deepcopy(config)  # because building a model writes its choice of attention into the config
    is_known = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    is_writer = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    auto = transformers.AutoModelForCausalLM if is_writer else transformers.AutoModel
    try:
        with torch.device("meta"), no_init_weights():
            model = found(config) if is_known else auto.from_config(config, trust_remote_code=False)
            model.tie_weights(recompute_mapping=False)
            return model
    except (*BUILD_ERRORS, AssertionError) as error:  # the last of torch, for a pad token outside the vocabulary
        raise BadInput(
            f"transformers {transformers.__version__} cannot build {named or 'a model'} of {config.name_or_path} "
            f"({config.model_type!r}): {first_line(error)}; models that bring their own code are not supported"
        ) from error


def _block_weights(model: "PreTrainedModel") -> dict[str, str]:
    """Return path -> kind of all layers in the blocks that multiply with matrices, in model order.

    A block is an element of an nn.ModuleList. All kinds but UNSPLITTABLE and GROUPED can be split.
    """
    kinds = {}
    for path, module in model.named_modules():
        if not _is_in_block(model, path):
            continue
        if is_linear(module):
            kinds[path] = type(module).__name__
        elif not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            # several matrices in one tensor; a vector with extra dimensions is not
            stacks = (
                name for name, p in module.named_parameters(recurse=False) if p.ndim >= 3 and min(p.shape[-2:]) > 1
            )
            kind = GROUPED if is_grouped(module) else UNSPLITTABLE
            kinds |= {f"{path}.{name}": kind for name in stacks}
            kinds |= {stack.path: "experts" for stack in stacks_of(path, module)}
    return kinds


def _is_in_block(model: nn.Module, path: str) -> bool:
    """Tell whether the path goes through an element of an nn.ModuleList; a linear element is a head, not a block."""
    parts = path.split(".")
    ancestors = (".".join(parts[:depth]) for depth in range(1, len(parts) - 1))
    return any(isinstance(model.get_submodule(ancestor), nn.ModuleList) for ancestor in ancestors)


def _is_wanted(path: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    return any(fnmatchcase(path, p) for p in include or "*") and not any(fnmatchcase(path, p) for p in exclude)


def _check_patterns(patterns: Sequence[str], paths: list[str]) -> None:
    unknown = [pattern for pattern in patterns if not any(fnmatchcase(path, pattern) for path in paths)]
    if unknown:
        raise BadInput(
            f"no linear layer in the blocks matches {', '.join(map(repr, unknown))}; "
            f"patterns are globs on paths such as {listing(paths, 3)}"
        )


def _refuse_unsplittable(paths: Sequence[str]) -> None:
    if paths:
        raise BadInput(
            f"{len(paths)} weights ({listing(paths, 3)}) are several matrices in one tensor, not experts that "
            "transformers runs one by one; exclude them by a pattern to keep them in 16 bits"
        )


def _spec(path: str, linear: nn.Module) -> WeightSpec:
    name, shape = f"{path}.weight", tuple(linear.get_parameter("weight").shape)
    out_features, in_features = reversed(shape) if is_transposed(linear) else shape
    layer = next(int(part) for part in path.split(".") if part.isdigit())
    sources = (Source(name, is_transposed=True),) if is_transposed(linear) else ()
    is_plain = is_replaced_by_bitsandbytes(linear)
    return WeightSpec(name, path, (out_features, in_features), role_of(path), layer, sources, is_plain=is_plain)


def _experts(stack: Stack) -> Iterator[WeightSpec]:
    layer = next(int(part) for part in stack.path.split(".") if part.isdigit())
    for number in range(stack.count):
        module, source = f"{stack.path}.{number}", Source(stack.path, number, is_transposed=stack.is_transposed)
        yield WeightSpec(f"{module}.weight", module, stack.shape, role_of(module), layer, (source,), stack.path)


def role_of(module: str) -> Role:
    """Return the role of the linear layer at a path: "o" for "encoder.layer.0.attention.output.dense"."""
    *parents, last = module.split(".")
    if is_expert(module):
        return "expert down" if parents[-1] == LAST else "expert up"
    in_attention = any("att" in part.lower() for part in parents[-2:])
    if last == "dense" and parents[-1:] == ["intermediate"]:
        return "up"
    if last in ("dense", "wo", "c_proj"):
        feeds_forward = last != "dense" or parents[-1:] == ["output"]
        return "o" if in_attention else "down" if feeds_forward else "other"
    return ROLE_BY_NAME.get(last, "other")
