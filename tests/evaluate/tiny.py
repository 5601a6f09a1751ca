"""Models with random weights and a few thousand parameters, and the logits of one text without batch or padding."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

SHARED = Path(__file__).parents[3] / "shared"
VOCABULARY = 61
PAD = 60
ROUNDOFF = 64 * 2.0**-24  # float32 logits of a two-layer model, in another order of summation when batched
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.4,  # large enough for predictions far from uniform
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
}
GPT2_SHAPE = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}


def llama(seed=0, **changes):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes})).eval()


def llama_classifier(classes=3, **changes):
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**{**SHAPE, **changes}, num_labels=classes)).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**GPT2_SHAPE, initializer_range=0.4)).eval()


def gpt2_classifier():
    torch.manual_seed(0)
    return GPT2ForSequenceClassification(GPT2Config(**GPT2_SHAPE, initializer_range=0.4, pad_token_id=PAD)).eval()


def tokens_of(lengths, limit=VOCABULARY):
    """Lists of random tokens below `limit`, of the lengths given."""
    return [
        [int(token) for token in np.random.default_rng([n, i]).integers(0, limit, n)] for i, n in enumerate(lengths)
    ]


def logits_of(model, tokens):
    """Logits of one text by itself, NumPy float64 [T, V], or [C] of a classifier."""
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float().numpy().astype(np.float64)


def sliding_windows(length, window, stride):
    """(start, end, position) for each position that is predicted: the first window that reaches it."""
    for position in range(1, length):
        later = max(0, math.ceil((position + 1 - window) / stride))
        end = min(window + later * stride, length)
        start = max(0, end - window) if stride < window else later * window
        if position > start:
            yield start, end, position


def shared(path):
    """A file or folder that comes with the workspace and not with the repository."""
    if not (SHARED / path).exists():
        pytest.skip(f"../shared/{path} is not there")
    return SHARED / path


def refused(sentence):
    return pytest.raises(ValueError, match=f"^{sentence}$")


IN_TRAINING = r"the model is in training mode, in which dropout changes its predictions: call eval\(\) first"
EMPTY_BATCH = "batch 0 is below 1"
