"""Tiny random models of several families, opened for calibration, and transformers' own model of the same weights."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import gettempdir, mkdtemp
from typing import Any

import numpy as np
import torch
import transformers

from qsvd.calibrate.gradients import GradientSums
from qsvd.calibrate.streamed import StreamedModel
from qsvd.calibrate.sums import Example, Sums, means
from qsvd.calibrate.walk import Probes, add_examples
from qsvd.files.check import check_complete
from qsvd.files.quantized.stack import TensorStack
from qsvd.files.source import Checkpoint, open_checkpoint
from qsvd.plan.weights import ModelPlan, plan_model
from tests.checkpoints import COMMON, FAMILIES, GROUPED

CPU = torch.device("cpu")
VOCABULARY = 96
LABELS = {"num_labels": 3}
OWN = {  # class -> (config class, options), as in tests.checkpoints
    "BertForSequenceClassification": ("BertConfig", COMMON | LABELS),
    "DebertaV2ForSequenceClassification": (
        "DebertaV2Config",
        COMMON | LABELS | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "ModernBertForSequenceClassification": (
        "ModernBertConfig",
        COMMON | LABELS | {"pad_token_id": 0, "local_attention": 4, "global_attn_every_n_layers": 2},
    ),
    "LlamaForSequenceClassification": ("LlamaConfig", GROUPED | LABELS | {"pad_token_id": 0}),
    "Gemma2ForCausalLM": (
        "Gemma2Config",
        GROUPED | {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "BloomForCausalLM": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY}),
    "AlbertForSequenceClassification": ("AlbertConfig", COMMON | LABELS | {"embedding_size": 16}),
    "Gemma3nForCausalLM": (
        "Gemma3nTextConfig",
        GROUPED
        | {"head_dim": 8, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8}
        | {"vocab_size_per_layer_input": VOCABULARY, "layer_types": ["sliding_attention", "full_attention"] * 2}
        | {"activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [64] * 4},
    ),
}


@dataclass(frozen=True)
class Case:
    """A checkpoint of a tiny model, what is split of it, and the model as transformers holds it."""

    checkpoint: Checkpoint
    plan: ModelPlan
    whole: Any

    def streamed(self, dtype=torch.float32, *, twice=False):
        """The model that is read block by block."""
        return StreamedModel(self.checkpoint, self.plan, CPU, dtype, twice=twice)


@cache
def case(architecture: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> Case:
    """A random model of this class; large weights, so that the loss is far from flat."""
    config_class, defaults = (FAMILIES | OWN)[architecture]
    config = getattr(transformers, config_class)(**(defaults | {"initializer_range": 0.2} | options))
    config.architectures = [architecture]
    torch.manual_seed(0)
    whole = getattr(transformers, architecture)(config).eval().to(dtype)
    folder = Path(mkdtemp())
    whole.save_pretrained(folder)
    checkpoint = open_checkpoint(str(folder))
    return Case(checkpoint, check_complete(checkpoint, plan_model(checkpoint.config)), whole)


def examples_of(architecture: str, lengths=(9, 14, 6)) -> list[Example]:
    """Random tokens; of a language model the first three carry no loss, as a prompt."""
    rng = np.random.default_rng(1)
    texts = [[int(token) for token in rng.integers(3, VOCABULARY, length)] for length in lengths]
    if architecture.endswith("Classification"):
        return [Example(text, length % 3) for text, length in zip(texts, lengths, strict=True)]
    return [Example(text, [-100] * 3 + text[3:]) for text in texts]


def sums_of(model: StreamedModel, examples, *, chunk=100, probes=0, seed=7, gradient_rank=None) -> Sums:
    """What a run adds up, `chunk` examples at a time."""
    sums = Sums.empty(model.plan.weights, CPU, has_traces=probes > 0)
    if gradient_rank is not None:
        experts = frozenset(spec.module for spec in model.plan.weights if spec.stack)
        sums.gradients = GradientSums(gradient_rank, seed, experts)
    for first in range(0, len(examples), chunk):
        for _ in add_examples(model, examples[first : first + chunk], sums, Probes(probes, seed), first=first):
            pass
    return sums


def means_of(model: StreamedModel, examples, *, probes=0, seed=7):
    """The tensors of the file."""
    return means(sums_of(model, examples, probes=probes, seed=seed), model.plan.weights, probes)


def inputs_of(example: Example):
    """What transformers' model takes, written out here."""
    return {"input_ids": torch.tensor([example.input_ids])}


def own_loss(whole, example: Example):
    """The loss as transformers computes it when it is given labels."""
    return whole(**inputs_of(example), labels=torch.tensor([example.target])).loss


def stack_of(most_bytes=1 << 30):
    """Where a GradientWalk keeps the inputs of blocks."""
    return TensorStack(Path(gettempdir()), most_bytes)
