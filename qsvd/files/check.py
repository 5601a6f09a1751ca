"""Compare a checkpoint with its config, and refuse quantized models, by names, shapes and dtypes of the tensors."""

import copy
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qsvd.errors import BadInput, listing
from qsvd.files.safetensors import READERS, Entry
from qsvd.files.source import Checkpoint, PickleEntry
from qsvd.plan.conversions import Conversion, rows_of
from qsvd.plan.rules import is_linear
from qsvd.plan.targets import is_expert
from qsvd.plan.weights import ModelPlan, Source, WeightSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MOST_NUMBERS = 2**25  # of a tensor that are checked at once
MOST_UNTOLD = 20e9  # bytes that are checked without a line: some seconds
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


def resolve(shapes: Mapping[str, tuple[int, ...]], plan: ModelPlan) -> ModelPlan:
    """Return the plan with the tensor names of the checkpoint, in `spelling` and in the name and sources of weights.

    A checkpoint may have other names than the model: without or with the prefix of the base model, or those of an older
    release (LayerNorm.gamma). transformers renames and converts tensors when it loads them; the same is applied here.

    Args:
        shapes: Of the tensors of the checkpoint, by name. Names that the model does not have become `unknown`.
        plan: From `plan_model`.

    Raises:
        BadInput: two tensors belong to one place in the model, or transformers computes a weight to split from other
            tensors, not by taking their rows.
    """
    from transformers.core_model_loading import dot_natural_key

    transforms = [copy.copy(transform) for transform in plan.transforms]  # some have state
    spelling: dict[str, str] = {}
    clashes, computed, unknown = [], dict[str, Conversion](), []
    for name in sorted(shapes, key=dot_natural_key):
        model_name, key, converter, pattern = _model_name(name, plan, transforms)
        if not _is_known(model_name, plan):
            unknown.append(name)
        if converter is not None:
            sources: Any = computed.setdefault(model_name, Conversion(converter, key, {})).sources
            sources.setdefault(pattern, []).append(name)
        elif spelling.setdefault(model_name, name) != name and model_name in plan.shapes:
            clashes.append(f"{spelling[model_name]} and {name} for {model_name}")
    if clashes:
        raise BadInput(f"the checkpoint has two tensors for one place in {plan.architecture}: {listing(clashes)}")
    known = {place: name for place, name in spelling.items() if _is_known(place, plan)}
    return replace(
        plan,
        weights=_read_from(plan, computed, spelling, shapes),
        spelling=known,
        optional=plan.optional | computed.keys(),
        conversions=tuple(computed.values()),
        unknown=tuple(unknown),
    )


def _read_from(
    plan: ModelPlan,
    computed: Mapping[str, Conversion],
    spelling: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[WeightSpec, ...]:
    """Return the weights to split with the names and sources of the checkpoint."""
    made = _made_of(plan, list(computed.values()), shapes)
    weights, fused = [], []
    for spec in plan.weights:
        if spec.place in made:
            weights.append(replace(spec, sources=made[spec.place][spec.module]))
            continue
        if spec.place in computed:
            fused.append(spec.module)
        sources = tuple(replace(source, tensor=spelling.get(source.tensor, source.tensor)) for source in spec.sources)
        weights.append(replace(spec, name=spelling.get(f"{spec.module}.weight", spec.name), sources=sources))
    if fused:
        raise BadInput(
            f"transformers computes {len(fused)} weights of {plan.architecture} from other tensors on loading "
            f"({listing(fused)}). Some of these are missing, or it takes more than their rows: load the model and save "
            "it in the new form, or exclude them"
        )
    _check_whole(weights, shapes)
    return tuple(weights)


def _check_whole(weights: Sequence[WeightSpec], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse to split a part of a tensor and to leave the rest."""
    parts, read = Counter[str](), dict[str, str]()
    for spec in weights:
        for source in spec.sources:
            shape = shapes.get(source.tensor, (0, 0))
            rows = shape[-2] if source.rows is None else source.rows[1] - source.rows[0]
            parts[source.tensor] += rows * shape[-1]
            read[source.tensor] = spec.module
    partly = [f"{name} ({read[name]})" for name, size in parts.items() if size != math.prod(shapes.get(name, ()))]
    if any(name in shapes for name in parts) and partly:
        raise BadInput(
            f"{len(partly)} tensors of the checkpoint hold several layers, not all of which are to be quantized: "
            f"{listing(partly)}; --include or --exclude all of them"
        )


def _made_of(
    plan: ModelPlan, conversions: Sequence[Conversion], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, dict[str, tuple[Source, ...]]]:
    """Return the sources of the weights to split that are computed, by module, for each parameter of the model."""
    places: dict[str, list[WeightSpec]] = {}
    for spec in plan.weights:
        places.setdefault(spec.place, []).append(spec)
    found: dict[str, dict[str, tuple[Source, ...]]] = {}
    for conversion in conversions if places else ():
        assert plan.model is not None, "plan_model keeps it"
        for name, matrices in rows_of(conversion, shapes, plan.model).items():
            place = placed(name, plan)
            specs = places.get(place, [])
            if specs and len(specs) == len(matrices):
                turned = [
                    tuple(_turned(part, spec) for part in parts) for spec, parts in zip(specs, matrices, strict=True)
                ]
                if all(_make(parts, spec, shapes) for spec, parts in zip(specs, turned, strict=True)):
                    found[place] = {spec.module: parts for spec, parts in zip(specs, turned, strict=True)}
    return found


def _make(parts: Sequence[Source], spec: WeightSpec, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether parts have the rows and columns of a weight."""
    rows, columns = 0, set[int]()
    for part in parts:
        high, wide = shapes[part.tensor][-2:]
        high = high if part.rows is None else part.rows[1] - part.rows[0]
        rows += wide if part.is_transposed else high
        columns.add(high if part.is_transposed else wide)
    return rows == spec.shape[0] and columns == {spec.shape[1]}


def _turned(part: Source, spec: WeightSpec) -> Source:
    """Return a part of the parameter as a part of the weight, which is its transpose if the model says so."""
    return replace(part, is_transposed=part.is_transposed != any(source.is_transposed for source in spec.sources))


def check_complete(checkpoint: Checkpoint, plan: ModelPlan) -> ModelPlan:
    """Check that every tensor of the plan is in the checkpoint; return the plan with its names (see `resolve`).

    Raises:
        BadInput: tensors are missing or have another shape than in the config, or weights to split have another dtype
            than F32, BF16 or F16; the sentence names every kind of fault.
    """
    plan = resolve({name: entry.shape for name, entry in checkpoint.tensors.items()}, plan)
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


def check_copies(checkpoint: Checkpoint, plan: ModelPlan) -> None:
    """Refuse tensors that the config ties, such as embedding and head, but that are stored with other values."""
    stored = [
        (plan.spelling[source], plan.spelling[name])
        for name, source in plan.tied.items()
        if source in plan.spelling and name in plan.spelling
    ]
    unequal = [pair for pair in stored if not torch.equal(*(checkpoint.read(name) for name in pair))]
    if unequal:
        raise BadInput(
            f"{checkpoint.name}: {listing([' and '.join(pair) for pair in unequal])} have other values, but "
            "config.json says that they are one tensor; set tie_word_embeddings to false there, or remove the wrong "
            "tensor"
        )


def check_finite(checkpoint: Checkpoint, plan: ModelPlan) -> None:
    """Refuse a NaN or an infinity in a tensor of the model. All of it is read once, a few pieces at a time.

    A tensor of one number may be infinite: a bound that Gemma 4 clips by. Values that are drawn, not read from files,
    are not looked at.

    Raises:
        BadInput: the sentence names the tensors, and how many of their numbers are wrong.
    """
    if not checkpoint.stamps:
        return
    names = [name for name in checkpoint.tensors if name not in plan.unknown]
    if (total := sum(checkpoint.tensors[name].num_bytes for name in names)) > MOST_UNTOLD:
        logging.getLogger("qsvd").warning(
            "%s: first, %.0f GB are read once to find NaN and infinity", checkpoint.name, total / 1e9
        )
    pieces = [piece for name in names for piece in _pieces(checkpoint.tensors[name])]
    wrong = Counter[str]()
    with ThreadPoolExecutor(READERS) as readers:
        for piece, count in zip(pieces, readers.map(partial(_num_wrong, checkpoint), pieces), strict=True):
            wrong[piece.tensor] += count
    problems = [
        f"{name} ({count} of {math.prod(checkpoint.tensors[name].shape)})" for name, count in wrong.items() if count
    ]
    if problems:
        raise BadInput(
            f"{checkpoint.name}: {len(problems)} tensors have values that are NaN or infinite: {listing(problems)}; "
            "repair the checkpoint"
        )


def _pieces(entry: Entry) -> list[Source]:
    """Return a tensor as pieces of at most MOST_NUMBERS where it can be parted."""
    size = math.prod(entry.shape)
    if len(entry.shape) == 3:
        return [Source(entry.name, index=index) for index in range(entry.shape[0])]
    if len(entry.shape) != 2 or size <= MOST_NUMBERS or isinstance(entry, PickleEntry):
        return [Source(entry.name)]
    rows = max(1, MOST_NUMBERS // entry.shape[1])
    return [Source(entry.name, rows=(r, min(r + rows, entry.shape[0]))) for r in range(0, entry.shape[0], rows)]


def _num_wrong(checkpoint: Checkpoint, piece: Source) -> int:
    """Return the number of NaN and infinities in a piece of a tensor."""
    values = checkpoint.read_part(piece)
    if not values.is_floating_point():
        return 0
    values = values.float() if values.itemsize == 1 else values
    if torch.isfinite(values.sum()):  # one cheap pass; finite numbers may overflow too, so that a count decides
        return 0
    return int((values.isnan() if math.prod(checkpoint.tensors[piece.tensor].shape) == 1 else ~values.isfinite()).sum())


def _model_name(name: str, plan: ModelPlan, transforms: list) -> tuple[str, str, Any, str]:
    """Return the model's name of a tensor of the checkpoint.

    Returns:
        That name; if transformers computes the parameter from it, the key, the converter and its pattern, else None.
    """
    from transformers.core_model_loading import WeightConverter

    converter, pattern = None, ""
    for transform in sorted(transforms, key=lambda transform: isinstance(transform, WeightConverter)):
        if converter is None or not isinstance(transform, WeightConverter):  # renamings chain, but one conversion
            name, source = transform.rename_source_key(name)
            if isinstance(transform, WeightConverter) and source is not None:
                converter, pattern = transform, source
    return placed(name, plan), name, converter, pattern


def placed(name: str, plan: ModelPlan) -> str:
    """Return a name of the model or of its base model as a name of the model."""
    prefix = f"{plan.base_prefix}."
    if name.startswith(prefix) and _is_known(name.removeprefix(prefix), plan):
        return name.removeprefix(prefix)
    return f"{prefix}{name}" if _is_known(f"{prefix}{name}", plan) else name


def _is_known(name: str, plan: ModelPlan) -> bool:
    """Return whether the model has the tensor, or the stack whose expert it is ("...experts.down_proj.3.weight")."""
    return name in plan.shapes or name.removesuffix(".weight").rpartition(".")[0] in plan.shapes


def _may_be_absent(name: str, plan: ModelPlan, present: Mapping[str, Entry]) -> bool:
    """Return whether the model needs no tensor of this name: it is optional, or tied to a tensor that is present."""
    if name in plan.optional:
        return True
    source = plan.tied.get(name, name)
    return any(other in present for other in (source, *(target for target, s in plan.tied.items() if s == source)))


def check_layers(model: Any, names: Mapping[str, str], weights: Mapping[str, Any], folder: Path) -> None:
    """Refuse a model whose config.json makes no linear layer, or one of another shape, where a weight was split.

    Args:
        names: Path of the layer -> name of its weight.
        weights: The weights of the manifest, by name.
        folder: Of the quantized model.
    """
    layers = {path: model.get_submodule(path) for path in names if not is_expert(path)}
    if odd := [path for path, layer in layers.items() if not is_linear(layer)]:
        raise BadInput(f"{type(model).__name__} has no linear layer at {listing(odd)}: {folder} has it")
    shapes = {path: sorted(weights[names[path]]["shape"]) for path in layers}
    if odd := [path for path, layer in layers.items() if sorted(layer.weight.shape) != shapes[path]]:
        file = folder / "config.json"
        raise BadInput(f"{file} makes {listing(odd)} of other shapes than the quantized weights; copy it again")
