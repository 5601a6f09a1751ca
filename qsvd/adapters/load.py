"""Load a quantized model with an adapter: build a transformers model without memory, and fill it tensor by tensor.

No dense weight is made. CPU memory holds one tensor at a time, and what is offloaded there.
"""

import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.experts import open_stack
from qsvd.adapters.linear import SplitLinear
from qsvd.adapters.model import SplitModel, keep_embeddings, restore, share_pages
from qsvd.adapters.pages.cache import PagedResidual, open_pages
from qsvd.adapters.start import Starts, check_method, gradients_of, new_record, read_weight, start_from
from qsvd.adapters.tables import pack_table
from qsvd.errors import BadInput, first_line, listing
from qsvd.files.adapter import AdapterFolder, AdapterRecord, check_base, open_adapter
from qsvd.files.check import check_layers, placed, resolve
from qsvd.files.layout import ADAPTER_TENSORS
from qsvd.files.quantized.padding import padding_of
from qsvd.files.readers import ReadAhead
from qsvd.files.split_folder import SplitFolder, open_split
from qsvd.files.statistics import Statistics
from qsvd.files.workspace import ADAPTER_RECORD
from qsvd.inputs.model_files import generation_config, read_config_json
from qsvd.memory.device import device_of, dtype_of, keep_freed_memory
from qsvd.memory.items import EVERYTHING, Placement
from qsvd.plan.targets import is_expert
from qsvd.plan.weights import BUILD_ERRORS, ModelPlan, build, describe

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def classifier(config: "PreTrainedConfig", labels: tuple[str, ...], folder: Path) -> Any:
    """Return transformers' class of a sequence classifier for this config, and write the labels into the config.

    Args:
        folder: Of the config and the tokenizer.

    Raises:
        BadInput: transformers has none for this type of model.
    """
    import transformers

    mapping = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if type(config) not in mapping:
        raise BadInput(f"transformers has no sequence classifier of model type {config.model_type!r}")
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    config.problem_type = "single_label_classification"
    text = config.get_text_config()
    padding = None
    with suppress(BadInput):  # who needs the tokenizer says what is wrong with it
        padding = padding_of(folder, config.to_dict())
    if padding is not None:  # config.json of older quantized models may say another one
        text.pad_token_id = padding[1]
    elif text.pad_token_id is None:  # without a tokenizer
        text.pad_token_id = text.eos_token_id[0] if isinstance(text.eos_token_id, list) else text.eos_token_id
    return mapping[type(config)]


def start_head(model: Any, plan: ModelPlan, *, is_classifier: bool, seed: int) -> tuple[str, ...]:
    """Make the head of a new classifier, which is in no file, on the device of the model. Return its parameters' names.

    It is initialized as transformers does it, in float32, and trained in full.

    Raises:
        BadInput: parameters are missing that do not belong to the head.
    """
    device = next(p.device for p in model.parameters() if not p.is_meta)
    empty = [name for name, p in model.named_parameters() if p.is_meta and name not in plan.tied]
    names = describe(build(model.config)).shapes if is_classifier else ()  # of the class that was quantized
    there = {*names, *(f"{plan.base_prefix}.{name}" for name in names)}
    head = [n for n in empty if is_classifier and (not n.startswith(f"{plan.base_prefix}.") or n not in there)]
    missing = sorted(set(empty) - set(head) - plan.optional)
    if missing:
        raise BadInput(f"the quantized model lacks {len(missing)} tensors of {plan.architecture}: {listing(missing)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for path in dict.fromkeys(name.rpartition(".")[0] for name in head):
            module = model.get_submodule(path).to_empty(device="cpu", recurse=False).float()
            model._init_weights(module)
            module.to(device).requires_grad_(True)
    inside = f"{plan.base_prefix}."
    for child in dict.fromkeys(".".join(name.split(".")[: 1 + name.startswith(inside)]) for name in head):
        model.get_submodule(child).register_forward_pre_hook(_in_float32)
    return tuple(head)


def _in_float32(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


@dataclass(frozen=True)
class _Place:
    """What to load, with which adapters, and where."""

    split: SplitFolder
    record: AdapterRecord
    device: torch.device
    dtype: torch.dtype
    placement: Placement
    starts: Starts
    is_trained: bool = False  # a stored adapter will be loaded
    gradients: Statistics | None = None  # that a new adapter starts from


def load(  # noqa: PLR0913  # each is a choice of its own
    folder: str | Path,
    adapter: str | Path | None = None,
    *,
    options: AdapterOptions | None = None,
    labels: tuple[str, ...] = (),
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    placement: Placement = EVERYTHING,
) -> Any:
    """Load a quantized model with an adapter, ready to generate or to train.

    Args:
        folder: A quantized model, as `qsvd quantize` writes it, or a run of `qsvd train`, whose record names it.
        adapter: A run of `qsvd train` on this folder, or one of its checkpoints; None makes a new adapter.
        options: Options of a new adapter.
        labels: Names of the classes; the model is then a sequence classifier with a new head, trained in full.
        device: "auto" is a GPU if there is one.
        dtype: Dtype of everything but residuals and adapters; None is bfloat16 on a GPU and float32 on a CPU.
        placement: Which residuals are kept on the device, and where the others are kept. The outputs are the same, to
            the bit.

    Returns:
        An instance of the transformers class, in evaluation mode, in which only the adapters (and a new head) require
        gradients.

    Raises:
        BadInput: the folder is not a quantized model, the adapter belongs to another one or does not fit, the method is
            unknown or cannot start from this model, transformers cannot build the model, or the placement is not
            possible.
    """
    folder = Path(folder).expanduser()
    if adapter is None and (folder / ADAPTER_RECORD).is_file():
        folder, adapter = _base_of(folder), folder
    split = open_split(folder)
    if adapter is None:
        record = new_record(split, options or AdapterOptions(), labels)
        return load_new(split, record, device=device, dtype=dtype, placement=placement)
    if options is not None or labels:
        raise BadInput(f"options and labels are stored in the adapter {adapter}: leave them out")
    trained = open_adapter(Path(adapter).expanduser())
    check_base(trained, split.folder, split.fingerprint)
    check_method(trained.record.method)
    return _load(replace(_place(split, trained.record, device, dtype, placement), is_trained=True), trained)


def load_new(  # as above
    split: SplitFolder,
    record: AdapterRecord,
    *,
    device: str | torch.device,
    dtype: torch.dtype | None,
    placement: Placement,
    is_restored: bool = False,
) -> Any:
    """Load a quantized model with a new adapter, without the file that it starts from if a run is restored later."""
    place = _place(split, record, device, dtype, placement, is_new=not is_restored)
    return _load(place if is_restored else replace(place, gradients=gradients_of(split, record)), None)


def _base_of(run: Path) -> Path:
    """Return the quantized model of a run."""
    base = Path(open_adapter(run).record.base)
    if not base.is_dir():
        raise BadInput(
            f"{run} was trained on {base}, which does not exist; give its new folder, "
            f"qsvd.load(OUT, adapter={str(run)!r})"
        )
    return base


def names_of(split: SplitFolder, record: AdapterRecord) -> ModelPlan:
    """Return the names of the model that `load` makes, in the spelling of the files; no weight is read."""
    return _empty(_place(split, record, "cpu", torch.float32, EVERYTHING))[1]


def _place(
    split: SplitFolder,
    record: AdapterRecord,
    device: str | torch.device,
    dtype: torch.dtype | None,
    placement: Placement,
    is_new: bool = False,
) -> _Place:
    device = device_of(str(device))
    starts = Starts(split, record, device, is_new=is_new)
    return _Place(split, record, device, dtype or dtype_of("auto", device), placement, starts)


def _load(place: _Place, adapter: AdapterFolder | None) -> "PreTrainedModel":
    pages = open_pages(place.split, place.device, place.placement)  # first: it sets how freed memory is kept
    model, plan = _empty(place)
    _fill(model, plan, place, pages)
    full = start_head(model, plan, is_classifier=bool(place.record.labels), seed=place.record.seed)
    model.tie_weights()
    if place.placement.embeddings_on_host:
        keep_embeddings(model, place.device)
    model.to(place.device)  # buffers that are in no file
    share_pages(model)
    if pages and place.device.type == "cpu":
        keep_freed_memory()
    model.split_record = replace(place.record, full=full)
    if adapter is not None:
        restore(model, adapter)
        model.trained_template = adapter.chat_template
    return model.eval()


def _empty(place: _Place) -> tuple[Any, ModelPlan]:
    """Return the model without memory for its parameters, all frozen, and its names in the spelling of the files."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    config = read_config_json(place.split.folder)
    delattr(config, "quantization_config")
    config.dtype = place.dtype
    config.name_or_path = _name(place)
    architecture = _class(config, place)
    kind = type(architecture.__name__, (SplitModel, architecture), {"__module__": architecture.__module__})
    with init_empty_weights(include_buffers=False), no_init_weights():
        try:
            model = kind(config)
        except (*BUILD_ERRORS, AssertionError) as error:
            file, why = place.split.folder / "config.json", first_line(error)
            raise BadInput(f"transformers cannot build {architecture.__name__} from {file}: {why}") from error
    model.tie_weights()
    if model.can_generate():
        model.generation_config = generation_config(place.split.folder, config)
    return model.requires_grad_(False), resolve(_own_names(place.split), describe(model))


def _name(place: _Place) -> str:
    """Return the path by which trainers load the tokenizer and a reference model: the model before training.

    from_pretrained does not load a run, nor the components of format 1. The name then says what to do.
    """
    folder = place.split.folder.resolve()
    if place.is_trained:
        return (
            f"{folder} with a trained adapter. Give DPOTrainer ref_model=model.reference(). GRPOTrainer and "
            "RLOOTrainer make the reference themselves: set beta=0, or open the run with PEFT"
        )
    if not (folder / ADAPTER_TENSORS).is_file() and any(place.split.ranks.values()):
        return f"{folder} in the layout of qsvd 0.1.0: move both files of adapter/ up next to config.json"
    return str(folder)


def _class(config: "PreTrainedConfig", place: _Place) -> Any:
    import transformers

    if place.record.labels:
        return classifier(config, place.record.labels, place.split.folder)
    return getattr(transformers, place.split.manifest["source"]["architecture"])


def _own_names(split: SplitFolder) -> dict[str, tuple[int, ...]]:
    """Return the names of the tensors that the 16-bit model had, and their shapes."""
    parts = split.residual_names - split.weights.keys() - split.tables.keys()
    return {n: entry.shape for n, entry in split.tensors.items() if n not in parts and ".lora_" not in n}


def _fill(model: Any, plan: ModelPlan, place: _Place, pages: Mapping[str, PagedResidual]) -> None:
    """Read every tensor of the folder into the model."""
    spelled = {name: model_name for model_name, name in plan.spelling.items()}
    if lost := [name for name in place.split.weights if name not in spelled]:
        raise BadInput(f"{plan.architecture} has no layers for {len(lost)} quantized weights: {listing(lost)}")
    split_modules = {spelled[name].removesuffix(".weight"): name for name in place.split.weights}
    check_layers(model, split_modules, place.split.weights, place.split.folder)
    for path, count in Counter(path.rpartition(".")[0] for path in split_modules if is_expert(path)).items():
        open_stack(model, path, count)
    _pack_tables(model, spelled, place.split)
    embedding = model.get_input_embeddings() if place.placement.embeddings_on_host else None
    names = sorted(spelled, key=lambda name: (place.split.tensors[name].file, place.split.tensors[name].start))
    on_gpu = place.device.type == "cuda"
    with ReadAhead(place.split.entries_of(names, paged=pages), pinned=on_gpu) as read:
        place = replace(place, split=replace(place.split, read=read))
        for name in names:
            owner, _, last = spelled[name].rpartition(".")
            if owner in split_modules and last == "weight":
                linear = _split_linear(owner, plan, name, place, pages.get(name))
                model.set_submodule(owner, linear, strict=True)
            elif owner not in split_modules:
                device = torch.device("cpu") if model.get_submodule(owner) is embedding else place.device
                _put(model, spelled[name], name, place, device)
    for conversion in plan.conversions:
        made = conversion.run(lambda name: _dense(place, name, place.dtype, place.device), model)
        for name, tensor in made.items():
            _set(model, placed(name, plan), tensor.to(_dtype(model, name, place)))


def _pack_tables(model: Any, spelled: Mapping[str, str], split: SplitFolder) -> None:
    for name in (name for name in split.tables if name in spelled):  # a classifier has no output head
        pack_table(model, spelled[name].removesuffix(".weight"), split.codec(name))


def _put(model: Any, model_name: str, name: str, place: _Place, device: torch.device) -> None:
    """Read a tensor that is not part of a split weight, or a quantized embedding or head, into the model."""
    dtype = _dtype(model, model_name, place)
    if name in place.split.tables:
        model.get_submodule(model_name.rpartition(".")[0]).fill(place.split.residual(name).to(device), dtype)
    else:
        _set(model, model_name, _dense(place, name, dtype, device))


def _set(model: Any, name: str, tensor: Tensor) -> None:
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    if last in module._parameters:
        module._parameters[last] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[last] = tensor


def _split_linear(path: str, plan: ModelPlan, name: str, place: _Place, paged: PagedResidual | None) -> SplitLinear:
    bias = plan.spelling.get(f"{path}.bias")
    stored = read_weight(place.split, name, place.device, place.starts, place.gradients, is_paged=paged is not None)
    adapter = start_from(stored, place.starts)
    bias_O = None if bias is None else _dense(place, bias, place.dtype, place.device)
    return SplitLinear(paged or stored.residual, adapter, bias_O, name, place.dtype)


def _dense(place: _Place, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    tensor = place.split.read(place.split.tensors[name])
    return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)


def _dtype(model: Any, name: str, place: _Place) -> torch.dtype:
    """Return the dtype in which transformers keeps this parameter when it loads the model: of some it is float32."""
    patterns = set[str]()
    if place.dtype == torch.float16:
        patterns.update(model._keep_in_fp32_modules or ())
    if place.dtype in (torch.float16, torch.bfloat16):
        patterns.update(model._keep_in_fp32_modules_strict or ())
    return torch.float32 if any(re.search(pattern, name) for pattern in patterns) else place.dtype
