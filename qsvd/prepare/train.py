"""Options of `qsvd train` to a checked run: quantized model, examples, settings, and what stays on the device."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.methods import METHODS
from qsvd.adapters.start import check_start, new_record
from qsvd.data.columns import Tokenized
from qsvd.data.template_names import check_tokens, read_template
from qsvd.errors import BadInput
from qsvd.files.adapter import FIRST_ALPHA, AdapterRecord
from qsvd.files.split_folder import SplitFolder, open_split
from qsvd.memory.block_bytes import Batch
from qsvd.memory.device import device_of, dtype_of
from qsvd.memory.placement import Placed, Wish
from qsvd.memory.training import Training
from qsvd.option_types import result_options
from qsvd.options import Train
from qsvd.prepare.check_options import check
from qsvd.prepare.examples import MOST_LENGTH, open_tokenizer, positions, training_examples
from qsvd.prepare.machine import machine, place_training, show_placement
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
    placed: Placed

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
    def identity(self) -> dict[str, Any]:
        """What the bytes of the adapter depend on."""
        options = result_options(self.options) | {"max_length": self.settings.max_length}
        data = {"data": _digest(self.data), "held_out": self.held_out and _digest(self.held_out)}
        if options["alpha"] is None and self.record.alpha != FIRST_ALPHA:  # else the same as in version 0.1
            options["alpha"] = self.record.alpha
        return options | {"device": self.device.type, "base_fingerprint": self.split.fingerprint} | data


def prepare_train(options: Train) -> TrainRun:
    """Open the quantized model and the data, tokenize, and refuse what cannot be trained."""
    check(options)
    device = device_of(options.device)
    if options.activation_offload == "yes" and device.type == "cpu":
        raise BadInput("--activation-offload yes needs a GPU; on a CPU the activations are in CPU memory already")
    here = machine(device, dtype_of(options.dtype, device), gpu=options.gpu, host=options.host)
    split = open_split(options.base.expanduser())
    max_length = options.max_length or min(MOST_LENGTH, positions(split))
    method = None if options.method == "auto" else options.method
    adapter_options = AdapterOptions(
        method,
        options.rank,
        options.alpha,
        options.adapter_dtype,
        options.seed,
        options.target_modules,
        options.dropout,
        options.rslora,
    )
    record = new_record(split, adapter_options)
    check_start(split, record)
    template = None if options.chat_template is None else read_template(options.chat_template)
    tokenizer = open_tokenizer(split.folder, template)
    check_tokens(options.chat_template or "", tokenizer)
    data, held_out = training_examples(options, tokenizer, split, max_length)
    if data.label_names:
        record = new_record(split, adapter_options, data.label_names)
    optimizer = default_optimizer(device) if options.optimizer == "auto" else options.optimizer
    training = _training(options, optimizer, max_length, data, device)
    wish = Wish(options.resident, "no" if data.label_names else options.activation_offload)
    placed = place_training(split, record, training, wish, here)
    return TrainRun(
        options=options,
        split=split,
        record=record,
        adapter_options=adapter_options,
        tokenizer=tokenizer,
        data=data,
        held_out=held_out,
        settings=_settings(options, record.method, optimizer, max_length, placed),
        device=device,
        dtype=here.dtype,
        placed=placed,
    )


def _settings(options: Train, method: str, optimizer: str, max_length: int, placed: Placed) -> Settings:
    names = Settings.__dataclass_fields__
    chosen: dict[str, Any] = {name: value for name, value in asdict(options).items() if name in names}
    chosen |= {"optimizer": optimizer, "max_length": max_length}
    chosen["activation_offload"] = placed.placement.activation_offload
    if options.learning_rate is None:
        chosen["learning_rate"] = METHODS[method].defaults.learning_rate
    return Settings(**chosen)


def _training(options: Train, optimizer: str, max_length: int, data: Tokenized, device: torch.device) -> Training:
    """Return what the planner counts: a step with the longest sequences that there are."""
    lengths = {len(tokens) for tokens in data.input_ids}
    rows = options.batch_size * (options.accumulate if options.layer_major else 1)  # padded to one length
    is_masked = options.packing or (rows > 1 and len(lengths) > 1)
    tokens = max_length if options.packing else max(lengths)
    batch = Batch(tokens, options.batch_size, is_masked, options.gradient_checkpointing, device.type)
    is_language = not data.label_names
    return Training(batch, options.accumulate, optimizer, options.layer_major, has_loss=is_language)


def _digest(data: Tokenized) -> str:
    """Return the SHA-256, in hex, of tokens, labels and label names."""
    return hashlib.sha256(json.dumps([data.input_ids, data.labels, data.label_names]).encode()).hexdigest()
