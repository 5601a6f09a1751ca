"""A real training step on the CPU, its tensors counted moment by moment, beside what the planner says of each."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from random_model import random_model, write_split
from torch import nn
from trl.trainer.utils import add_fused_lm_head

import qsvd
from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.start import new_record, planned_base
from qsvd.commands.demo import MODEL
from qsvd.files.split_folder import open_split
from qsvd.memory.items import EVERYTHING, Placement
from qsvd.memory.split_model import SplitModelPlan
from qsvd.memory.training import Moment, Training, moments_of
from qsvd.training.settings import limit_tiles
from tests.memory.tracker import Tracker

VOCABULARY = 4096  # of the embedded model's tokenizer
LONGEST = 16_384
LAYERS = 3
GROUPED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": LONGEST,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
FAMILIES = {  # name -> class, class of the config, its options
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GROUPED | {"sliding_window": 128}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", GROUPED | EXPERTS),
    "lfm2": (
        "Lfm2ForCausalLM",
        "Lfm2Config",
        GROUPED | {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    ),
}
FORWARD, LOSS, BACKWARD = PHASES = ("forward", "loss", "backward")


@dataclass(frozen=True)
class Phase:
    """Bytes at the start of a part of a step, and at most during it."""

    start: int
    peak: int


class PhaseTracker(Tracker):
    """A tracker that is told where a part of a step begins, and keeps the highest peak of each kind of part."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Phase] = {}
        self._name, self._start = FORWARD, 0

    def begin(self, name: str) -> None:
        """End the part that runs and begin another."""
        self.end()
        self._name, self._start, self.peak = name, self.now, self.now

    def end(self) -> None:
        """End the part that runs."""
        old = self.found.get(self._name)
        if old is None or self.peak > old.peak:
            self.found[self._name] = Phase(self._start, self.peak)


def make_base(family: str, folder: Path, rank: int) -> Path:
    """Write a quantized model of a family whose weights are drawn; return its folder."""
    architecture, config, options = FAMILIES[family]
    chosen = getattr(transformers, config)(**options, architectures=[architecture])
    model = random_model(family, chosen, 0, torch.device("cpu"), layers_per_shard=LAYERS, files=MODEL)
    write_split(model, qsvd.Quantize(family, out=folder, rank=rank, device="cpu"))
    return folder


@dataclass(frozen=True)
class Step:
    """A step to count.

    Args:
        kept: Number of blocks that keep their activations.
        placement: Which residuals stay in memory.
    """

    base: Path
    options: AdapterOptions
    dtype: torch.dtype
    training: Training
    kept: int = 0
    placement: Placement = EVERYTHING

    def plan(self) -> SplitModelPlan:
        """Return what the planner knows of the model."""
        split = open_split(self.base)
        return planned_base(split, new_record(split, self.options), self.dtype)

    def planned(self) -> dict[str, Moment]:
        """Return the largest planned moment of each kind."""
        found: dict[str, Moment] = {}
        for moment in moments_of(self.plan(), self.training, self.kept):
            name = {"final norm": LOSS}.get(moment.name, moment.name)
            if name in PHASES and (name not in found or moment.total > found[name].total):
                found[name] = moment
        return found

    def measured(self) -> dict[str, Phase]:
        """Return the bytes of a real backward pass: the first one, or one that finds gradients."""
        model = qsvd.load(
            self.base, options=self.options, device="cpu", dtype=self.dtype, placement=self.placement
        ).train()
        model.unrecomputed = self.kept
        if self.training.batch.checkpointing:
            model.activation_checkpointing_enable()
        model.enable_input_require_grads()
        limit_tiles(model.device)
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        shape = (self.training.batch.batch, self.training.batch.tokens)
        tokens = torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(0))
        if self.training.accumulate > 1:
            model(input_ids=tokens[:, :16], labels=tokens[:, :16].clone(), fused_lm_head=True).loss.backward()
        mask = torch.ones(shape, dtype=torch.long)
        if self.training.batch.is_masked:
            mask[1:, -3:] = 0
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        blocks = [model.get_submodule(block.path) for block in self.plan().language_blocks]
        with PhaseTracker() as tracker, _watched(blocks, tracker):
            model(input_ids=tokens, attention_mask=mask, labels=tokens.clone(), fused_lm_head=True).loss.backward()
            tracker.end()
        return {name: Phase(one.start + gradients, one.peak + gradients) for name, one in tracker.found.items()}


@contextmanager
def _watched(blocks: list[nn.Module], tracker: PhaseTracker) -> Iterator[None]:
    """Tell the tracker where the loss begins, which is after the last block, and where each backward pass begins."""

    def ended(block: nn.Module, _arguments: Any, output: Any) -> None:
        if tracker.found.keys() & {LOSS, BACKWARD} or tracker._name != FORWARD:  # a block that runs again
            return
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        if hidden.requires_grad:
            hidden.register_hook(lambda _: tracker.begin(BACKWARD))
        if block is blocks[-1]:
            tracker.begin(LOSS)

    handles = [block.register_forward_hook(ended) for block in blocks]
    yield
    for handle in handles:
        handle.remove()
