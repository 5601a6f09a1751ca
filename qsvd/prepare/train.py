"""Options of `qsvd train` to a checked run: quantized model, examples, settings, and what stays on the device."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.gradients import gradients_digest, starts_from_gradients
from qsvd.adapters.load import load_new
from qsvd.adapters.methods.families import said_of_frozen
from qsvd.adapters.methods.table import METHODS, expert_options, has_pair, own_options
from qsvd.adapters.model import restore
from qsvd.adapters.start import check_start, new_record, planned_base
from qsvd.data.examples import Home, RunData, first_lines, read_run_data
from qsvd.errors import BadInput, listing
from qsvd.files.adapter import (
    FIRST_ALPHA,
    PARAMETERS,
    AdapterFolder,
    AdapterRecord,
    check_base,
    open_adapter,
)
from qsvd.files.split_folder import SplitFolder, open_split
from qsvd.files.trained.records import read_identity
from qsvd.memory.placement import Placed
from qsvd.memory.split_model import SplitModelPlan
from qsvd.memory.training import Training, num_kept, show_activations
from qsvd.option_types import result_options
from qsvd.options import Train, TrainingOptions
from qsvd.plan.allocation import EXPERT_RANK
from qsvd.plan.targets import EVERYTHING, EXPERTS
from qsvd.prepare.check_options import check
from qsvd.prepare.machine import (
    Machine,
    check_offload,
    place_training,
    show_batches,
    show_placement,
    train_machine,
    train_wish,
    training_of,
    with_batches,
)
from qsvd.report.errors import short_count
from qsvd.training.liger import said_of_liger
from qsvd.training.run_folder import KEPT, Recorded, is_saved, recorded
from qsvd.training.settings import Settings

SMALL, SMALL_RATE = 10**9, 1e-3  # weights of a small model, and the lowest of the best rates measured for such models


@dataclass(frozen=True)
class PlannedRun:
    """A run of `qsvd train` as far as it is known before the quantized model is opened, which may not exist yet."""

    options: Train
    data: RunData
    method: str
    adapter_dtype: str
    settings: Settings
    device: torch.device
    dtype: torch.dtype
    training: Training
    placed: Placed
    elements: int  # of the quantized weights
    blocks: int
    chosen: tuple[str, ...]  # sentences on what was chosen by default

    @property
    def out(self) -> Path:
        """The folder of the run."""
        return self.options.out.expanduser()

    @property
    def activations(self) -> str:
        """Which activations are kept, in words."""
        return show_activations(self.training, self.placed.placement, self.blocks)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.settings.steps:
            return self.settings.steps
        batches = math.ceil(len(self.data.lengths) / self.settings.batch_size)
        return math.ceil(math.ceil(batches / self.settings.accumulate) * self.settings.epochs)

    @property
    def rows(self) -> dict[str, str]:
        """The settings, the data and the number of steps, in words; options about files are left out."""
        shared = {field.name for field in fields(TrainingOptions)}
        settings = {name: value for name, value in asdict(self.settings).items() if name in shared}
        data, held_out = self.data.train, self.data.held_out
        return {name.replace("_", "-"): str(value) for name, value in settings.items()} | {
            "gradient-checkpointing": f"{self.options.gradient_checkpointing}: {self.activations}",
            "method": self.method,
            "adapter dtype": self.adapter_dtype,
            "device": f"{self.device}, {self.dtype}",
            "sequences": f"{len(data.input_ids):,} with {data.num_tokens:,} tokens{self._packed}",
            "trained tokens": f"{data.num_trained:,}",
            "held out": f"{len(held_out.input_ids) if held_out else 0:,} sequences",
            "steps": f"{self.total_steps:,}",
        }

    @property
    def _packed(self) -> str:
        rows = self.data.packed
        return "" if rows is None else f", packed into {len(rows):,} rows of at most {max(self.data.lengths):,}"

    @property
    def first_lines(self) -> list[str]:
        """What is said before the work."""
        lines = [*first_lines(self.options, self.data), *self.chosen]
        if self.options.learning_rate is None and self.elements < SMALL:
            lines.append(
                f"Learning rate: {self.settings.learning_rate:g}, the default, suits models of 7B and more; for this "
                f"one ({short_count(self.elements)} weights) try --learning-rate {SMALL_RATE:g}"
            )
        return lines

    @property
    def identity(self) -> dict[str, Any]:
        """What the bytes of the adapter depend on, as far as it is known."""
        held_out = self.data.held_out
        data = {"data": self.data.train.digest, "held_out": held_out and held_out.digest}
        if starts_from_gradients(self.method) and self.options.init_from is None:
            data["gradients"] = _digest_of_gradients(self.options)
        kept = num_kept(self.training, self.placed.placement, self.blocks)
        known = {
            "max_length": self.settings.max_length,
            "device": self.device.type,
            "base_fingerprint": None,
            KEPT: kept,
        }
        return result_options(self.options) | known | data


@dataclass(frozen=True)
class TrainRun(PlannedRun):
    """A checked run of `qsvd train`.

    Args:
        init_from: The adapter that this one starts as.
    """

    split: SplitFolder
    record: AdapterRecord
    init_from: AdapterFolder | None

    @property
    def resident(self) -> str:
        """Which quantized weights stay on the device, in words."""
        return show_placement(self.placed.placement, self.split)

    @property
    def identity(self) -> dict[str, Any]:
        """What the bytes of the adapter depend on."""
        found = super().identity | {"base_fingerprint": self.split.fingerprint}
        if self.init_from is not None:
            found["init_from"] = hashlib.sha256((self.init_from.folder / PARAMETERS).read_bytes()).hexdigest()
        if found["alpha"] is None and self.record.alpha != FIRST_ALPHA:  # else the same as in version 0.1
            found["alpha"] = self.record.alpha
        return found


def prepare_train(options: Train, data: RunData | None = None) -> TrainRun:
    """Open the quantized model and the data, tokenize, and refuse what cannot be trained.

    Args:
        data: Read already, from the 16-bit model of this quantized one.
    """
    check(options)
    old = recorded(options.out.expanduser())
    return prepare_run(options, train_machine(options), data, must_fit=True, old=old)


def prepare_run(
    options: Train, here: Machine, data: RunData | None = None, *, must_fit: bool, old: Recorded | None = None
) -> TrainRun:
    """Return the run that a machine would do on a quantized model.

    Args:
        must_fit: Whether to raise a DoesNotFit if there is too little memory. `qsvd plan` shows such a run.
        old: What was chosen when the run began; None for a new run.
    """
    check_offload(options, here.device)
    split = open_split(Path(options.base).expanduser())
    adapter_options, first = starting_options(options, split)
    record = new_record(split, adapter_options)
    check_start(split, record, is_restored=first is not None or is_saved(options.out.expanduser()))
    check_pairs(options, record.method)
    if data is None:
        data = read_run_data(options, Home(str(options.base), split.folder, split.manifest["source"]["architecture"]))
    labels = data.train.label_names
    if first is not None and first.record.labels != labels:
        there, here_too = (listing(names) or "none" for names in (first.record.labels, labels))
        raise BadInput(f"--init-from {options.init_from} has the classes {there}, and {options.data} has {here_too}")
    if labels:
        record = new_record(split, adapter_options, labels)
    run = plan_run(options, planned_base(split, record, here.dtype), data, here, must_fit=must_fit, old=old)
    known = {field.name: getattr(run, field.name) for field in fields(run)}
    return TrainRun(**known, split=split, record=record, init_from=first)


def check_pairs(options: TrainingOptions, method: str) -> None:
    """Refuse a preconditioner, or lora-rite, where the method does not train two factors of each weight."""
    flags = {
        "--precondition riemannian": options.precondition == "riemannian",
        "--optimizer lora-rite": options.optimizer == "lora-rite",
    }
    for flag in [flag for flag, is_given in flags.items() if is_given and not has_pair(method)]:
        able = listing([name for name in METHODS if has_pair(name)])
        raise BadInput(
            f"{flag} needs a method that trains both factors of each weight and nothing between them ({able}), and "
            f"--method is {method}: change one of them"
        )


def plan_run(
    options: Train, model: SplitModelPlan, data: RunData, here: Machine, *, must_fit: bool, old: Recorded | None = None
) -> PlannedRun:
    """Return the run on a model that is known by its shapes, and its options with numbers; see `prepare_run`."""
    device, is_auto = here.device, options.batch_size == "auto"
    wish = train_wish(options, old, is_labelled=bool(data.train.label_names))
    length = sum(data.lengths) / len(data.lengths)
    options = with_batches(options, model, lambda way: _training(way, data, device), length, wish, here)
    training = _training(options, data, device)
    placed = place_training(model, training, wish, here, must_fit=must_fit)
    number = num_kept(training, placed.placement, len(model.blocks))
    settings = _settings(options, model.method, training.optimizer, data.max_length, placed)
    return PlannedRun(
        options=options,
        data=data,
        method=model.method,
        adapter_dtype=str(model.adapter_dtype).removeprefix("torch."),
        settings=replace(settings, gradient_checkpointing=number < len(model.blocks), unrecomputed=number),
        device=device,
        dtype=here.dtype,
        training=training,
        placed=placed,
        elements=model.elements,
        chosen=(*_chosen(options, model, device), *((show_batches(training, length),) if is_auto else ())),
        blocks=len(model.blocks),
    )


def _chosen(options: Train, model: SplitModelPlan, device: torch.device) -> Iterator[str]:
    """Yield why the method is lora, and the rank of experts, where these were not given, and whose kernels run."""
    yield from said_of_liger(model.skeleton.model.config.model_type, device)
    weights = [spec for spec in model.names.weights if model.adapters[spec.name].trained]
    bare = [spec for spec in weights if not model.allocation.choices[spec.module].rank]
    if options.method == "auto" and options.init_from is None and 0 < len(bare) < len(weights):
        yield (
            f"Method: {model.method}, since {len(bare)} of {len(weights)} layers have no components: every layer gets "
            "a new adapter. --method pissa trains the stored components alone"
        )
    yield from said_of_frozen(model)
    experts, given = [spec.module for spec in weights if spec.stack], adapter_options_of(options)
    if experts and expert_options(given, METHODS[model.method], experts[0]) != given:
        yield f"Experts: rank {EXPERT_RANK} each, the default for experts; --rank sets that of all layers"


def load_start(run: TrainRun, *, is_resumed: bool) -> Any:
    """Load the model with the adapter that the training starts from.

    Args:
        is_resumed: The caller restores a checkpoint.
    """
    model = load_new(
        run.split,
        run.record,
        device=run.device,
        dtype=run.dtype,
        placement=run.placed.placement,
        is_restored=run.init_from is not None or is_resumed,
    )
    if run.options.chat_template is not None:
        model.trained_template = run.data.tokenizer.chat_template
    if run.init_from is not None:
        restore(model, run.init_from)
    return model


def starting_options(options: TrainingOptions, split: SplitFolder) -> tuple[AdapterOptions, AdapterFolder | None]:
    """Return the options of a new adapter, and the one of --init-from, whose method, rank, scale and layers it has."""
    given = adapter_options_of(options)
    if options.init_from is None:
        return given, None
    first = open_adapter(options.init_from.expanduser())
    check_base(first, split.folder, split.fingerprint)
    names = ("method", "rank", "alpha", "target_modules", "rslora")
    there = {name: getattr(first.record, name) for name in names}
    chosen = {name: getattr(given, name) for name in names} | dict(given.own)
    known = there | dict(first.record.own)
    wrong = [
        f"--{name.replace('_', '-')} ({known.get(name) or 'the default'} there)"
        for name, value in chosen.items()
        if value and value != known.get(name)
    ]
    if wrong:
        raise BadInput(f"--init-from {options.init_from} has another adapter: leave out {', '.join(wrong)}")
    return replace(given, **there, own=first.record.own), first


def _settings(options: Train, method: str, optimizer: str, max_length: int, placed: Placed) -> Settings:
    names = Settings.__dataclass_fields__
    chosen: dict[str, Any] = {name: value for name, value in asdict(options).items() if name in names}
    chosen |= {"optimizer": optimizer, "max_length": max_length}
    chosen["activation_offload"] = placed.placement.activation_offload
    if options.learning_rate is None:
        chosen["learning_rate"] = METHODS[method].defaults.learning_rate
    return Settings(**chosen)


def adapter_options_of(options: TrainingOptions) -> AdapterOptions:
    """Return the method of an adapter and its options."""
    targets = options.target_modules
    if options.train_experts:
        targets = (*targets, EXPERTS) if targets else EVERYTHING
    return AdapterOptions(
        None if options.method == "auto" else options.method,
        options.rank,
        options.alpha,
        options.adapter_dtype,
        options.seed,
        targets,
        options.dropout,
        options.rslora,
        own_options(options, "pissa" if options.method == "auto" else options.method),
    )


def _training(options: Train, data: RunData, device: torch.device) -> Training:
    """Return what the planner counts: a step with the longest sequences that there are."""
    lengths = set(data.lengths)
    training = training_of(options, max(lengths), device, is_even=len(lengths) == 1)
    pixels = 0 if data.train.media is None else training.batch.batch * data.train.media.pixels
    return replace(training, has_loss=not data.train.label_names, pixels=pixels)


def _digest_of_gradients(options: Train) -> str | None:
    """Return the digest of the file of gradients, or that of the run where the file is gone."""
    file: Path | None = getattr(options, "gradients", None)
    found = None if file is None else gradients_digest(file.expanduser())
    return found or (read_identity(options.out.expanduser()) or {}).get("gradients")
