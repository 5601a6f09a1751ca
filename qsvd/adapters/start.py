"""New adapters: their record, the adapter of each weight before its first step, and their shapes for the planner."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from qsvd.adapters.adapter import FEW, Adapter, AdapterOptions, StoredWeight, no_components
from qsvd.adapters.gradients import open_gradients
from qsvd.adapters.methods.families import Assigned, InCommon, assign, head_size_of, num_trained, planned_tensors
from qsvd.adapters.methods.frozen import Frozen
from qsvd.adapters.methods.table import METHODS, as_recorded, check_own_options, default_method, options_for
from qsvd.errors import BadInput
from qsvd.files.adapter import AdapterFolder, AdapterRecord
from qsvd.files.safetensors import read_tensor
from qsvd.files.source import read_config
from qsvd.files.split_folder import SplitFolder
from qsvd.files.statistics import Statistics
from qsvd.memory.split_model import Skeleton, SplitModelPlan, skeleton
from qsvd.plan.allocation import Allocation, Choice, Table, shared
from qsvd.plan.targets import check_targets, is_target, target_names
from qsvd.plan.tensors import AdapterTensors, Family
from qsvd.plan.weights import ModelPlan, WeightSpec, describe, role_of


def new_record(split: SplitFolder, options: AdapterOptions, labels: tuple[str, ...] = ()) -> AdapterRecord:
    """Return the record of a new adapter.

    Raises:
        BadInput: the method, a layer to train or the dtype is unknown, an option belongs to another method, or there is
            only one label.
    """
    options = replace(options, target_modules=target_names(options.target_modules))
    check_targets(options.target_modules, split.module_ranks)
    method = _method(split.module_ranks, options) if options.method is None else options.method
    check_method(method)
    check_own_options(method, options)
    options = replace(options, method=method)
    defaults = METHODS[method].defaults
    if len(labels) == 1:
        raise BadInput(f"labels has the one class {labels[0]!r}; a classifier needs at least two")
    return AdapterRecord(
        base=str(split.folder.resolve()),
        fingerprint=split.fingerprint,
        method=method,
        rank=options.rank,
        alpha=options.alpha if defaults.rank is None else defaults.alpha_of(options, defaults.rank_of(options, 0)),
        dtype=_dtype_name(split, options),
        seed=options.seed,
        labels=labels,
        target_modules=options.target_modules,
        dropout=options.dropout,
        rslora=options.rslora,
        own=as_recorded(options.own),
    )


def _method(ranks: Mapping[str, int], options: AdapterOptions) -> str:
    """Return the default method for the layers to train, by the stored ranks of all layers."""
    return default_method(rank for module, rank in ranks.items() if is_target(module, options.target_modules))


def gradients_of(split: SplitFolder, record: AdapterRecord) -> Statistics | None:
    """Open the file of gradients that a new adapter starts from; see `open_gradients`."""
    weights = [weight for weight in split.weights.values() if weight["module"] in split.module_ranks]
    shapes = {weight["module"]: tuple(weight["shape"]) for weight in weights}
    return open_gradients(record.method, _options_of(record), split.manifest["source"]["fingerprint"], shapes)


def check_start(split: SplitFolder, record: AdapterRecord, *, is_restored: bool = False) -> None:
    """Refuse options that the method cannot use: start the smallest trained weight of every stored rank.

    Args:
        is_restored: The tensors of a run follow, so that no gradients are needed.
    """
    gradients = None if is_restored else gradients_of(split, record)
    able = {name: weight for name, weight in split.weights.items() if weight["module"] in split.module_ranks}
    starts = Starts(split, record, torch.device("cpu"))
    kinds = {name: starts.kind(name) for name in able}
    trained = {name: able[name] for name, kind in kinds.items() if kind is not Frozen} or able
    for rank in sorted({weight["rank"] for weight in trained.values()}):
        sizes = {name: math.prod(weight["shape"]) for name, weight in trained.items() if weight["rank"] == rank}
        smallest = min(sizes, key=lambda name: sizes[name])
        start_adapter(split, record, smallest, torch.device("cpu"), gradients, starts)


def check_method(method: str) -> None:
    """Raise BadInput if the method is unknown."""
    if method not in METHODS:
        raise BadInput(f"method {method!r} is not one of {', '.join(METHODS)}")


def _dtype_name(split: SplitFolder, options: AdapterOptions) -> str:
    if options.dtype not in ("auto", "float32", "bfloat16"):
        raise BadInput(f"adapter dtype {options.dtype!r} is not one of auto, float32, bfloat16")
    stored = {weight["module"]: weight["rank"] for weight in split.weights.values()}
    return _resolved(options.dtype, num_trained(options, _specs(split), stored, _assigned(split, options)))


def _assigned(split: SplitFolder, options: AdapterOptions) -> Assigned:
    has_families = METHODS[str(options.method)].in_common
    head_size = head_size_of(read_config(split.folder)) if has_families else None
    return assign(options, _specs(split), split.module_ranks, head_size)


def _specs(split: SplitFolder) -> list[WeightSpec]:
    return [_spec(name, weight) for name, weight in split.weights.items()]


def _resolved(dtype: str, count: int) -> str:
    """Return the name of the dtype of so many trained parameters; "auto" is float32 while they are few."""
    if dtype != "auto":
        return dtype
    return "float32" if count <= FEW else "bfloat16"


class Starts:
    """The method of each layer of a quantized model, and what its weights have in common when they start.

    Args:
        is_new: The tensors of no run follow.
        device: That weights are started on.
    """

    def __init__(self, split: SplitFolder, record: AdapterRecord, device: torch.device, *, is_new: bool = False):
        self.split, self.options = split, _options_of(record)
        self.assigned = _assigned(split, self.options)
        names = {weight["module"]: name for name, weight in split.weights.items()}
        like = torch.empty(0, dtype=getattr(torch, split.manifest["run"]["dtype"]), device=device)
        read = (lambda module: read_components(split, names[module])) if is_new else None
        self.in_common = InCommon(self.options, self.assigned.families, read, like)

    def kind(self, name: str) -> type[Adapter]:
        """Return the method of a weight, by its tensor in the quantized model."""
        return self.assigned.kinds[self.split.weights[name]["module"]]

    def family(self, name: str) -> Family | None:
        """Return the family of a weight."""
        return self.assigned.families.get(self.split.weights[name]["module"])


def start_adapter(
    split: SplitFolder,
    record: AdapterRecord,
    name: str,
    device: torch.device,
    gradients: Statistics | None = None,
    starts: Starts | None = None,
) -> Adapter:
    """Return the adapter of one weight before its first step; `name` is its tensor in the quantized model.

    Args:
        gradients: From `gradients_of`; None if the tensors of a run follow.
        starts: For this device; None makes it, for one weight.

    Raises:
        BadInput: the method cannot start from the weight's components.
    """
    starts = starts or Starts(split, record, device)
    return start_from(read_weight(split, name, device, starts, gradients), starts)


def read_weight(  # each is a choice of its own
    split: SplitFolder,
    name: str,
    device: torch.device,
    starts: Starts,
    gradients: Statistics | None,
    *,
    is_paged: bool = False,
) -> StoredWeight:
    """Read one weight.

    Args:
        starts, gradients: As for `start_adapter`.
        is_paged: Read the residual only if the method starts from its values.
    """
    up_OR, down_RI = read_components(split, name)
    kind, module = starts.kind(name), split.weights[name]["module"]
    if is_paged and not kind.starts_from_residual:
        residual = split.unread_residual(name)
    else:
        residual = split.residual(name).to(device)
    gradient = None
    if gradients is not None and kind.starts_from_gradient:
        gradient = gradients.gradient(module)
    stored = StoredWeight(residual, up_OR.to(device), down_RI.to(device), name, gradient, module)
    return replace(stored, family=starts.family(name), common=starts.in_common.of(module))


def read_components(split: SplitFolder, name: str) -> tuple[Tensor, Tensor]:
    """Return B [O, R] and A [R, I] of one weight; R is 0 if only the residual is stored."""
    rows, columns = split.weights[name]["shape"]
    return split.factors(name) or (torch.zeros(rows, 0), torch.zeros(0, columns))


def start_from(stored: StoredWeight, starts: Starts) -> Adapter:
    """Return the same as `start_adapter`, for a weight that was read already."""
    # Each weight has its own generator, so that its start does not depend on which others are made, and in which order.
    digest = hashlib.sha256(f"{starts.options.seed} {stored.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:6]))
    try:
        kind = starts.kind(stored.name)
        return kind.start(
            stored, options_for(starts.options, kind, stored.module, starts.assigned.trainable), generator
        )
    except ValueError as error:
        raise BadInput(f"{starts.split.folder}: {stored.name}: {error}") from error


def trained_adapter(adapter: AdapterFolder, name: str, modules: Mapping[str, str], starts: Starts) -> Adapter:
    """Return the saved adapter of one weight, on the CPU.

    Args:
        name: The weight's tensor in the quantized model.
        modules: Path of the module of every weight in the trained model, by its tensor.
        starts: For the CPU.

    Raises:
        BadInput: the folder lacks parameters of it.
    """
    device = torch.device("cpu")
    made = start_adapter(starts.split, adapter.record, name, device, None, starts).requires_grad_(False)
    places = {}
    for part in made.state_dict():
        own, family = f"{modules[name]}.{part}", starts.family(name)
        is_common = made.family and part in made.in_common  # it is there once, under one weight of the family
        there = (f"{path}.{part}" for other, path in modules.items() if is_common and starts.family(other) is family)
        places[part] = next((place for place in chain((own,), there) if place in adapter.tensors), own)
    missing = [place for place in places.values() if place not in adapter.tensors]
    if missing:
        raise BadInput(f"{adapter.folder} lacks {', '.join(missing)}")
    for part, tensor in made.state_dict().items():
        tensor.copy_(read_tensor(adapter.tensors[places[part]]))
    made.forget()
    return made


def _options_of(record: AdapterRecord) -> AdapterOptions:
    return AdapterOptions(**{name: getattr(record, name) for name in AdapterOptions.__dataclass_fields__})


# For the planner: a quantized model with adapters, from its folder or from a config alone.


def planned_base(split: SplitFolder, record: AdapterRecord, dtype: torch.dtype) -> SplitModelPlan:
    """Return the shapes of what `load` makes of a quantized model and a record; no weight is read."""
    return planner_of(split, dtype)(record)


def planner_of(split: SplitFolder, dtype: torch.dtype) -> Callable[[AdapterRecord], SplitModelPlan]:
    """Return a function that does the same for several records; it is the same one for an equal model."""
    texts = (read_config(split.folder).to_json_string(), json.dumps(split.manifest, sort_keys=True))
    return _planner(_Known(texts, dtype, split))


@dataclass(frozen=True)
class _Known:
    """A quantized model as a key: the texts of config.json and of the manifest decide its shapes, wherever it is."""

    texts: tuple[str, str]
    dtype: torch.dtype
    split: SplitFolder = field(compare=False)


@lru_cache(maxsize=16)
def _planner(known: _Known) -> Callable[[AdapterRecord], SplitModelPlan]:
    split, config = known.split, read_config(known.split.folder)
    delattr(config, "quantization_config")
    config.architectures = [split.manifest["source"]["architecture"]]
    empty = skeleton(config, known.dtype)
    names = replace(describe(empty.model), weights=tuple(_specs(split)))
    every = Allocation({w["module"]: Choice(split.codec(name), w["rank"]) for name, w in split.weights.items()})
    tables = tuple(_table(name, w, split, names) for name, w in split.tables.items())
    dtype = getattr(torch, split.manifest["run"]["dtype"])

    @lru_cache(maxsize=64)
    def make(options: AdapterOptions) -> SplitModelPlan:
        return replace(planned(empty, names, every, options=options, stored_dtype=dtype), tables=tables)

    return lambda record: make(_options_of(record))


def planned(
    empty: Skeleton,
    names: ModelPlan,
    allocation: Allocation,
    *,
    options: AdapterOptions,
    stored_dtype: torch.dtype = torch.bfloat16,
) -> SplitModelPlan:
    """Return the shapes of a quantized model with adapters, which may not exist yet.

    Args:
        empty: The 16-bit model, without memory.
        names: Its weights to quantize.
        allocation: Codec and stored rank of each.
        options: Options of the adapters.
        stored_dtype: Dtype of the components.

    Raises:
        BadInput: the method cannot start from these ranks.
    """
    stored = {spec.module: allocation.choices[spec.module].rank for spec in names.weights}
    ranks = {spec.module: stored[spec.module] for spec in names.weights if not spec.is_tower}
    targets = target_names(options.target_modules)
    options = replace(options, target_modules=targets)
    check_targets(targets, ranks)
    name = options.method or _method(ranks, options)
    check_own_options(name, options)
    options = replace(options, method=name)
    head_size = head_size_of(empty.model.config) if METHODS[name].in_common else None
    assigned = assign(options, names.weights, ranks, head_size)
    trains_one = any(stored[m] for m, kind in assigned.kinds.items() if kind is not Frozen)
    if METHODS[name].needs_components and not trains_one:
        raise no_components(name, METHODS[name].component_use)
    count = num_trained(options, names.weights, stored, assigned)
    dtypes = (getattr(torch, _resolved(options.dtype, count)), stored_dtype)
    known: dict[Any, AdapterTensors] = {}  # one record for all weights that are alike

    def tensors(spec: WeightSpec) -> AdapterTensors:
        kind, family = assigned.kinds[spec.module], assigned.families.get(spec.module)
        rank = options_for(options, kind, spec.module, ranks).rank  # experts and blocks may have another one
        key = (kind, family and family.name, spec.shape, stored[spec.module], rank)
        if key not in known:
            known[key] = planned_tensors(options, spec, stored[spec.module], assigned, dtypes)
        return known[key]

    adapters = {spec.name: tensors(spec) for spec in names.weights}
    return SplitModelPlan(empty, names, allocation, adapters, name)


def _spec(name: str, weight: Mapping[str, Any]) -> WeightSpec:
    module, (rows, columns) = weight["module"], weight["shape"]
    layer = next(int(part) for part in module.split(".") if part.isdigit())
    kind = {"stack": weight.get("stack", ""), "is_tower": weight.get("tower", False)}
    return WeightSpec(name, module, (rows, columns), role_of(module), layer, **kind)


def _table(name: str, table: Mapping[str, Any], split: SplitFolder, names: ModelPlan) -> Table:
    module, (rows, columns) = table["module"], table["shape"]
    others = shared(names, module)
    return Table(name, module, (rows, columns), table["role"], -1, codec=split.codec(name), others=others)
