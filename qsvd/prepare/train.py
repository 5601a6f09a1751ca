"""Options of `qsvd train` to a checked run: quantized model, examples, settings, and what stays on the device."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.load import load
from qsvd.adapters.methods import METHODS
from qsvd.adapters.model import restore
from qsvd.adapters.start import check_start, new_record
from qsvd.data.columns import Tokenized
from qsvd.data.template_names import check_tokens, read_template
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
from qsvd.memory.block_bytes import Batch
from qsvd.memory.device import device_of, dtype_of
from qsvd.memory.placement import Placed, Wish
from qsvd.memory.training import Training
from qsvd.option_types import result_options
from qsvd.options import Train, TrainingOptions
from qsvd.prepare.check_options import check
from qsvd.prepare.examples import checked_length, open_tokenizer, positions, training_examples
from qsvd.prepare.machine import Machine, machine, place_training, show_placement
from qsvd.training.settings import Settings, default_optimizer


@dataclass(frozen=True)
class TrainRun:
    """A checked run of `qsvd train`."""

    options: Train
    split: SplitFolder
    record: AdapterRecord
    adapter_options: AdapterOptions
    tokenizer: Any
    data: Tokenized
    held_out: Tokenized | None
    settings: Settings
    device: torch.device
    dtype: torch.dtype
    training: Training
    placed: Placed
    init_from: AdapterFolder | None  # the adapter that this one starts as

    @property
    def out(self) -> Path:
        """The folder of the run."""
        return self.options.out.expanduser()

    @property
    def resident(self) -> str:
        """Which quantized weights stay on the device, in words."""
        return show_placement(self.placed.placement, self.split)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run; with packing an upper bound, since only the trainer packs."""
        settings = self.settings
        if settings.steps:
            return settings.steps
        batches = math.ceil(len(self.data.input_ids) / settings.batch_size)
        return math.ceil(math.ceil(batches / settings.accumulate) * settings.epochs)

    @property
    def rows(self) -> dict[str, str]:
        """The settings, the data and the number of steps, in words; options about files are left out."""
        shared = {field.name for field in fields(TrainingOptions)}
        settings = {name: value for name, value in asdict(self.settings).items() if name in shared}
        return {name.replace("_", "-"): str(value) for name, value in settings.items()} | {
            "method": self.record.method,
            "adapter dtype": self.record.dtype,
            "device": f"{self.device}, {self.dtype}",
            "sequences": f"{len(self.data.input_ids):,} with {self.data.num_tokens:,} tokens",
            "trained tokens": f"{self.data.num_trained:,}",
            "held out": f"{len(self.held_out.input_ids) if self.held_out else 0:,} sequences",
            "steps": f"{self.total_steps:,}" + (" at most" if self.settings.packing else ""),
        }

    @property
    def identity(self) -> dict[str, Any]:
        """What the bytes of the adapter depend on."""
        options = result_options(self.options) | {"max_length": self.settings.max_length}
        if self.init_from is not None:
            options["init_from"] = hashlib.sha256((self.init_from.folder / PARAMETERS).read_bytes()).hexdigest()
        data = {"data": _digest(self.data), "held_out": self.held_out and _digest(self.held_out)}
        if options["alpha"] is None and self.record.alpha != FIRST_ALPHA:  # else the same as in version 0.1
            options["alpha"] = self.record.alpha
        return options | {"device": self.device.type, "base_fingerprint": self.split.fingerprint} | data


def prepare_train(options: Train) -> TrainRun:
    """Open the quantized model and the data, tokenize, and refuse what cannot be trained."""
    check(options)
    device = device_of(options.device)
    here = machine(device, dtype_of(options.dtype, device), gpu=options.gpu, host=options.host)
    return prepare_run(options, here, must_fit=True)


def prepare_run(options: Train, here: Machine, *, must_fit: bool) -> TrainRun:
    """Return the run that a machine would do.

    Args:
        must_fit: Whether to raise a DoesNotFit if there is too little memory. `qsvd plan` shows such a run.
    """
    device = here.device
    if options.activation_offload == "yes" and device.type == "cpu":
        raise BadInput("--activation-offload yes needs a GPU; on a CPU the activations are in CPU memory already")
    split = open_split(options.base.expanduser())
    max_length = checked_length(options.max_length, positions(split), str(options.base))
    adapter_options, first = starting_options(options, split)
    record = new_record(split, adapter_options)
    check_start(split, record)
    template = None if options.chat_template is None else read_template(options.chat_template)
    tokenizer = open_tokenizer(split.folder, template)
    check_tokens(options.chat_template or "", tokenizer)
    data, held_out = training_examples(options, tokenizer, split, max_length)
    if first is not None and first.record.labels != data.label_names:
        there, here_too = (listing(names) or "none" for names in (first.record.labels, data.label_names))
        raise BadInput(f"--init-from {options.init_from} has the classes {there}, and {options.data} has {here_too}")
    if options.eval_every is not None and held_out is None:
        raise BadInput("--eval-every needs held-out examples: give --valid DATA, or a larger --held-out")
    if data.label_names:
        record = new_record(split, adapter_options, data.label_names)
    training = _training(options, max_length, data, device)
    wish = Wish(options.resident, "no" if data.label_names else options.activation_offload)
    placed = place_training(split, record, training, wish, here, must_fit=must_fit)
    return TrainRun(
        options=options,
        split=split,
        record=record,
        adapter_options=adapter_options,
        tokenizer=tokenizer,
        data=data,
        held_out=held_out,
        settings=_settings(options, record.method, training.optimizer, max_length, placed),
        device=device,
        dtype=here.dtype,
        training=training,
        placed=placed,
        init_from=first,
    )


def load_start(run: TrainRun) -> Any:
    """Load the model with the adapter that the training starts from."""
    model = load(
        run.split.folder,
        options=run.adapter_options,
        labels=run.data.label_names,
        device=run.device,
        dtype=run.dtype,
        placement=run.placed.placement,
    )
    if run.options.chat_template is not None:
        model.trained_template = run.tokenizer.chat_template
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
    wrong = [
        f"--{name.replace('_', '-')} ({there[name] or 'the default'} there)"
        for name in names
        if (value := getattr(given, name)) and value != there[name]
    ]
    if wrong:
        raise BadInput(f"--init-from {options.init_from} has another adapter: leave out {', '.join(wrong)}")
    return replace(given, **there), first


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
    return AdapterOptions(
        None if options.method == "auto" else options.method,
        options.rank,
        options.alpha,
        options.adapter_dtype,
        options.seed,
        options.target_modules,
        options.dropout,
        options.rslora,
    )


def _training(options: Train, max_length: int, data: Tokenized, device: torch.device) -> Training:
    """Return what the planner counts: a step with the longest sequences that there are."""
    lengths = {len(tokens) for tokens in data.input_ids}
    tokens = max_length if options.packing else max(lengths)
    training = training_of(options, tokens, device, is_even=len(lengths) == 1)
    return replace(training, has_loss=not data.label_names)


def training_of(options: TrainingOptions, tokens: int, device: torch.device, *, is_even: bool = False) -> Training:
    """Return a run with sequences of a length; `is_even` if all have it, so that none is padded."""
    rows = options.batch_size * (options.accumulate if options.layer_major else 1)  # padded to one length
    is_masked = options.packing or (rows > 1 and not is_even)
    batch = Batch(tokens, options.batch_size, is_masked, options.gradient_checkpointing, device.type)
    optimizer = default_optimizer(device) if options.optimizer == "auto" else options.optimizer
    return Training(batch, options.accumulate, optimizer, options.layer_major)


def _digest(data: Tokenized) -> str:
    """Return the SHA-256, in hex, of tokens, labels and label names."""
    return hashlib.sha256(json.dumps([data.input_ids, data.labels, data.label_names]).encode()).hexdigest()
