"""A model as a user names it: a 16-bit model, a quantized model, or a run of qsvd train."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.linear import dense_delta
from qsvd.adapters.load import classifier, load, names_of
from qsvd.adapters.methods.frozen import Frozen
from qsvd.adapters.methods.table import METHODS
from qsvd.adapters.start import Starts, new_record, read_components, trained_adapter
from qsvd.data.columns import Examples
from qsvd.errors import BadInput, listing
from qsvd.export.trained import Trained, TrainedModel
from qsvd.files.adapter import AdapterFolder, AdapterRecord, check_base, open_adapter
from qsvd.files.atomic import read_object
from qsvd.files.check import check_complete, check_copies, check_not_quantized
from qsvd.files.published import is_published
from qsvd.files.safetensors import read_tensor
from qsvd.files.source import Checkpoint, download, open_checkpoint, read_config
from qsvd.files.split_folder import SplitFolder, open_split
from qsvd.files.workspace import Kind, model_kind
from qsvd.inputs.model_files import MODEL, from_folder, generation_config
from qsvd.inputs.paths import check_checkpoint, local_path
from qsvd.memory.items import EVERYTHING, Placement
from qsvd.options import Allocate, Calibrate, Quantize
from qsvd.plan.weights import ModelPlan, is_classifier, plan_model, writers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def open_16_bit(
    options: Quantize | Allocate | Calibrate, checkpoint: Checkpoint | None = None
) -> tuple[Checkpoint, ModelPlan]:
    """Open a 16-bit model and name the weights that are split.

    Args:
        options: The model, a folder or a hub id, and the patterns of module names.
        checkpoint: An open one, which is taken instead of the model.

    Raises:
        BadInput: the model cannot be opened, is quantized already, lacks tensors, or has other values in tensors
            that its config ties.
    """
    checkpoint = checkpoint or open_checkpoint(options.model)
    check_not_quantized(checkpoint.config, checkpoint.tensors)
    plan = plan_model(
        checkpoint.config,
        include=options.include,
        exclude=options.exclude,
        include_towers=options.include_towers,
    )
    plan = check_complete(checkpoint, plan)
    check_copies(checkpoint, plan)
    return checkpoint, plan


@dataclass(frozen=True)
class NamedModel:
    """A model that was found, not loaded yet.

    Args:
        home: The folder with the tokenizer and config.json: the model, or the quantized model of a run.
        architecture: The class in transformers of a quantized model, or of the quantized model of a run.
        labels: The class names of a run.
        chat_template: Of a run, if it was trained with another one than the tokenizer's.
    """

    name: str
    kind: Kind
    home: Path
    architecture: str = ""
    labels: tuple[str, ...] = ()
    chat_template: str | None = None


def find_model(name: str, base: Path | None) -> NamedModel:
    """Return what a name stands for.

    Args:
        base: Where the quantized model of a run is now; None is where it was when the run was made.

    Raises:
        BadInput: there is no such model, it is none of the three, or the quantized model of the run is another one.
    """
    kind, folder = model_kind(name), local_path(name)
    if kind == "16-bit" or folder is None:
        return NamedModel(name, "16-bit", folder or download(name))
    if kind == "split":
        return NamedModel(name, "split", folder, _architecture(open_split(folder)))
    adapter = open_adapter(folder)
    home = base.expanduser() if base is not None else Path(adapter.record.base)
    if not home.is_dir():
        raise BadInput(f"{name} was trained on {home}, which does not exist; give --base with its new folder")
    split = open_split(home)
    check_base(adapter, home, split.fingerprint)
    return NamedModel(name, "trained", home, _architecture(split), adapter.record.labels, adapter.chat_template)


def _architecture(split: SplitFolder) -> str:
    return split.manifest["source"]["architecture"]


def class_of(found: NamedModel) -> str:
    """Return the class in transformers of a model; "" for a 16-bit model whose config.json names none."""
    names = read_object(found.home / "config.json").get("architectures") or [""]
    return found.architecture or names[0]


def record_of(found: NamedModel, split: SplitFolder) -> AdapterRecord:
    """Return the adapter record of a run, or that of a new adapter on a quantized model."""
    if found.kind == "trained":
        return open_adapter(Path(found.name).expanduser()).record
    return new_record(split, AdapterOptions())


def check_kind(found: NamedModel, *, classifier: bool) -> None:
    """Refuse a model that is not a classifier, or not a language model, where one is needed.

    A 16-bit model is checked when it is loaded.
    """
    if found.kind == "16-bit":
        return
    classifies = bool(found.labels) or is_classifier(found.architecture)
    if classifier and not classifies:
        raise BadInput(
            f"{found.name} has no classification head, which labelled examples need; give a run trained on labels"
        )
    if not classifier and found.labels:
        raise BadInput(f"{found.name} is a classifier ({listing(found.labels)}), which needs labelled examples")
    if not classifier and found.architecture not in writers():
        raise BadInput(f"{found.name} is a {found.architecture}, which does not predict tokens; give a language model")


def load_model(
    found: NamedModel,
    device: torch.device,
    dtype: torch.dtype,
    *,
    classifier: bool = False,
    placement: Placement = EVERYTHING,
) -> Any:
    """Return the model in evaluation mode; `placement` is for quantized models and runs.

    Raises:
        BadInput: it cannot be built, or is a 16-bit model that is not a classifier or a language model as needed.
    """
    if found.kind != "16-bit":
        adapter = found.name if found.kind == "trained" else None
        return load(found.home, adapter=adapter, device=device, dtype=dtype, placement=placement)
    model, info = _decoded(found, dtype, classifier=classifier) or _dense(found, dtype, classifier=classifier)
    if missing := sorted(info["missing_keys"]):  # transformers draws them at random
        raise BadInput(f"{found.name} lacks {len(missing)} weights of a {type(model).__name__}: {listing(missing)}")
    parameters = ((name, value) for name, value in model.named_parameters() if value.numel() > 1)
    wrong = [name for name, value in parameters if not torch.isfinite(value.sum()) and not value.isfinite().all()]
    if wrong:  # a sum is one cheap pass
        raise BadInput(
            f"{found.name}: {len(wrong)} tensors have values that are NaN or infinite: {listing(wrong)}; repair the "
            "checkpoint"
        )
    return model.to(device).eval()


def _dense(found: NamedModel, dtype: torch.dtype, *, classifier: bool) -> tuple[Any, dict[str, Any]]:
    """Return a 16-bit model, and what transformers says about its loading."""
    import transformers

    name = class_of(found)
    if classifier:
        auto: Any = transformers.AutoModelForSequenceClassification
    else:
        auto = getattr(transformers, name) if name in writers() else transformers.AutoModelForCausalLM
    check_checkpoint(found.home)
    read_config(found.home)  # refuses absurd numbers, and kernels of the Hub
    return from_folder(auto, found.home, MODEL, dtype=dtype, output_loading_info=True)


def _decoded(found: NamedModel, dtype: torch.dtype, *, classifier: bool) -> tuple[Any, dict[str, Any]] | None:
    """Return a model that is published in FP8 or MXFP4 as `_dense` does; None if it is not.

    transformers would compute it with kernels for FP8 on a GPU, and refuses cut blocks. Its class gets our tensors.
    """
    import transformers

    if not is_published(read_object(found.home / "config.json").get("quantization_config")):
        return None
    checkpoint = open_checkpoint(str(found.home))
    check_not_quantized(checkpoint.config, checkpoint.tensors)
    config = checkpoint.config
    classes: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if classifier:
        classes = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if type(config) not in classes:
        raise BadInput(f"{found.name} is not a {'classifier' if classifier else 'language model'} of transformers")
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    model, info = classes[type(config)].from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True, trust_remote_code=False
    )
    model.name_or_path = str(found.home)
    if model.can_generate():
        model.generation_config = generation_config(found.home, config)
    return model, info


@dataclass(frozen=True)
class Opened:
    """A quantized model, and perhaps a run, open for export.

    Args:
        adapter: None for the stored components as they are.
        trained: The same in the form that exports take.
    """

    split: SplitFolder
    adapter: AdapterFolder | None
    record: AdapterRecord
    trained: TrainedModel

    @property
    def task(self) -> str | None:
        """The task_type of PEFT."""
        if self.record.labels:
            return "SEQ_CLS"
        return "CAUSAL_LM" if self.split.manifest["source"]["architecture"].endswith("ForCausalLM") else None

    @property
    def trained_experts(self) -> list[str]:
        """The experts that were trained, by their paths."""
        split, record = self.split, self.record
        experts = [weight["module"] for weight in split.weights.values() if "stack" in weight]
        if self.adapter is None or not experts:
            return []
        kinds = Starts(split, record, torch.device("cpu")).assigned.kinds
        return [path for path in experts if kinds[path] is not Frozen]

    @property
    def config_changes(self) -> dict[str, Any]:
        """The entries of config.json that a classifier changes."""
        labels = self.record.labels
        if not labels:
            return {}
        config: Any = read_config(self.split.folder)
        architecture = classifier(config, labels, self.split.folder).__name__
        return {
            "architectures": [architecture],
            "id2label": {str(number): label for number, label in config.id2label.items()},
            "label2id": config.label2id,
            "problem_type": config.problem_type,
            "pad_token_id": config.get_text_config().pad_token_id,  # decoders find the end of a text by it
        }

    def load(self) -> Any:
        """Load the trained model as qsvd runs it, in float32 on the CPU."""
        adapter = None if self.adapter is None else self.adapter.folder
        return load(self.split.folder, adapter=adapter, device="cpu", dtype=torch.float32)


def open_trained(run: Path, base: Path | None) -> Opened:
    """Open a run with its quantized model, or a quantized model.

    Raises:
        BadInput: the quantized model of the run is missing or another one.
    """
    found = find_model(str(run), base)
    split = open_split(found.home)
    if found.kind == "split":

        def stored(name: str) -> Trained:
            up_OR, down_RI = read_components(split, name)
            return Trained(up_OR.float(), down_RI.float())

        return Opened(split, None, new_record(split, AdapterOptions()), TrainedModel(split, stored))
    adapter = open_adapter(run.expanduser())
    spelling = names_of(split, adapter.record).spelling
    modules = {name: path.removesuffix(".weight") for path, name in spelling.items() if name in split.weights}
    starts = Starts(split, adapter.record, torch.device("cpu"))

    def weight(name: str) -> Trained:
        made = trained_adapter(adapter, name, modules, starts)
        up_OK, down_KI = made.exported()
        gain_O = made.gain(lambda: split.residual(name))
        if gain_O is None and METHODS[adapter.record.method].has_gain:  # a layer that was not trained
            gain_O = torch.ones(len(up_OK))
        delta_OI = dense_delta(made, down_KI.shape[1], down_KI.device)
        return Trained(up_OK.float(), down_KI.float(), gain_O, delta_OI)

    full = {name: read_tensor(adapter.tensors[name]) for name in adapter.record.full}
    return Opened(split, adapter, adapter.record, TrainedModel(split, weight, full, spelling))


def class_names(config: "PreTrainedConfig", examples: Examples) -> tuple[str, ...]:
    """Return the class names of a 16-bit classifier in order, or their numbers where the examples have numbers."""
    known: dict[Any, str] = dict(config.id2label or {})
    names = tuple(known[number] for number in sorted(known))
    numbers = tuple(str(number) for number in range(len(names)))
    return numbers if {str(row["label"]) for row in examples.rows} <= set(numbers) else names
