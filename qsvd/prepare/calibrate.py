"""Options of `qsvd calibrate` to a checked run: the 16-bit model, the examples, what the statistics depend on."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qsvd.calibrate.sums import Example
from qsvd.data.columns import Examples, recognise
from qsvd.data.examples import (
    check_hears,
    check_reads_images,
    checked_length,
    cut_in_words,
    mapping_of,
    open_tokenizer,
    stop_ids,
)
from qsvd.data.images import open_processor, tokenize_images
from qsvd.data.read import read_rows
from qsvd.data.tokens import check_vocabulary, tokenize
from qsvd.errors import BadInput
from qsvd.files.check import check_finite
from qsvd.files.source import Checkpoint
from qsvd.files.statistics import open_statistics, unfinished_path
from qsvd.files.workspace import check_same
from qsvd.memory.device import device_of, dtype_of
from qsvd.option_types import result_options
from qsvd.options import Calibrate
from qsvd.plan.weights import ModelPlan, context_length, is_classifier, writers
from qsvd.prepare.check_options import check
from qsvd.prepare.models import class_names, open_16_bit


@dataclass(frozen=True)
class CalibrateRun:
    """A checked run of `qsvd calibrate`."""

    options: Calibrate
    checkpoint: Checkpoint
    plan: ModelPlan
    examples: tuple[Example, ...]
    device: torch.device
    dtype: torch.dtype
    cut: str  # a sentence on examples that were cut, or nothing

    @property
    def out(self) -> Path:
        """The file of the statistics."""
        return self.options.out.expanduser()

    @property
    def identity(self) -> dict[str, Any]:
        """What the bytes of the file depend on."""
        return result_options(self.options) | {
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "source_fingerprint": self.checkpoint.fingerprint,
            "tokens_sha256": tokens_digest(self.examples),
        }

    @cached_property
    def is_complete(self) -> bool:
        """Whether an earlier run wrote the file; a BadInput where it is another file."""
        if not self.out.exists():
            return False
        check_same(self.out, open_statistics(self.out).record.get("run", {}), self.identity, "give --out another file")
        return True

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all examples."""
        return sum(len(example.input_ids) for example in self.examples)


def tokens_digest(examples: Sequence[Example]) -> str:
    """Return the SHA-256 digest of the tokens, labels and images of examples."""
    sequences = [
        [
            list(one.input_ids),
            one.target,
            one.segments,
            *([one.images[0].digests[one.images[1]]] if one.images else []),
        ]
        for one in examples
    ]
    return hashlib.sha256(json.dumps(sequences).encode()).hexdigest()


def prepare_calibrate(options: Calibrate) -> CalibrateRun:
    """Open the 16-bit model and the data, tokenize, and refuse what cannot be calibrated."""
    check(options)
    device = device_of(options.device)
    checkpoint, plan = open_16_bit(options)
    length = checked_length(options.max_length, context_length(checkpoint.config), options.model)
    options = replace(options, max_length=length)
    examples, cut = draw_examples(options, checkpoint, plan)
    run = CalibrateRun(options, checkpoint, plan, examples, device, dtype_of(options.dtype, device), cut)
    if not run.is_complete and not unfinished_path(run.out).exists():  # refuses the file of another run
        check_finite(checkpoint, plan)
    return run


def draw_examples(
    options: Calibrate, checkpoint: Checkpoint, plan: ModelPlan, *, has_loss: bool = True
) -> tuple[tuple[Example, ...], str]:
    """Return as many examples as are asked for, in the order of the data, and a sentence on those that were cut.

    Args:
        has_loss: Whether the loss on the examples is computed; else any model that reads texts takes any texts.
    """
    assert checkpoint.folder is not None, "opened from files"
    assert options.max_length is not None, "chosen by now"
    if has_loss and not is_classifier(plan.architecture) and plan.architecture not in writers():
        raise BadInput(
            f"{options.model} is a {plan.architecture}, which has no loss on texts or labels; give a language model "
            f"(...ForCausalLM) or a classifier (...ForSequenceClassification)"
        )
    examples = recognise(read_rows(options.data, split=options.split), mapping_of(options.map))
    _check_kind(options, plan, examples, has_loss=has_loss)
    chosen: Any = {"max_length": options.max_length, "loss_on": options.loss_on}
    chosen["stop_ids"] = stop_ids(checkpoint.folder)
    if examples.has_images:
        check_reads_images(plan.architecture, options.model, options.data)
        processor: Any = open_processor(checkpoint.folder)
        data, tokenizer = tokenize_images(examples, processor, **chosen), processor.tokenizer
    else:
        _check_towers(options)
        names = _labels(checkpoint, examples) if examples.kind == "labelled" else None
        tokenizer = open_tokenizer(checkpoint.folder)
        data = tokenize(examples, tokenizer, **chosen, label_names=names)
    check_vocabulary([data], tokenizer, checkpoint.folder, checkpoint.name)
    there = len(data.input_ids)
    if there < options.examples:
        raise BadInput(
            f"{options.data} gives {there} examples of at most {options.max_length} tokens, fewer than --examples "
            f"{options.examples}; give more data, or --examples {there}"
        )
    order = torch.randperm(there, generator=torch.Generator().manual_seed(options.seed))
    types = data.token_types or [None] * there
    drawn = sorted(order[: options.examples].tolist())
    images = [data.media and (data.media, index) for index in range(there)]
    found = tuple(Example(data.input_ids[n], data.labels[n], types[n], images[n]) for n in drawn)
    return found, cut_in_words(data, options.max_length) if data.truncated else ""


def _check_kind(options: Calibrate, plan: ModelPlan, examples: Examples, *, has_loss: bool) -> None:
    """Refuse examples that the model does not read, or whose loss it does not have."""
    check_hears(plan.architecture, options.model, examples)
    if examples.kind == "speech":
        raise BadInput(f"{options.model} is an encoder-decoder model of sound, which qsvd calibrate does not measure")
    classifies = is_classifier(plan.architecture)
    if classifies != (examples.kind == "labelled") and (has_loss or not classifies):
        wanted = "labelled texts" if classifies else "texts, chats or completions"
        raise BadInput(
            f"{options.data} holds {examples.kind} examples, and {options.model} is a {plan.architecture}, which "
            f"learns from {wanted}"
        )


def _check_towers(options: Calibrate) -> None:
    """Refuse to measure an encoder of images on examples without images."""
    if options.include_towers:
        raise BadInput(
            f"--include-towers measures the encoder of images, and {options.data} has no images: give examples with "
            "images, or leave it out"
        )


def _labels(checkpoint: Checkpoint, examples: Examples) -> tuple[str, ...]:
    """Return the class names of the model."""
    names = class_names(checkpoint.config, examples)
    if len(names) < 2:
        raise BadInput(f"{checkpoint.name} has {len(names)} class, as for regression; 2 or more are needed")
    return names
