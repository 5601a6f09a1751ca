"""Loss on examples of which only some tokens count: answers whose questions are masked.

Shape suffixes: N = sequences of one batch, T = tokens of the longest, P = counted predictions, V = vocabulary.
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch.nn import functional

from qsvd.evaluate import perplexity
from qsvd.evaluate.batches import Model, by_length, check_ready, check_sequences, padded
from qsvd.evaluate.perplexity import Perplexity
from qsvd.plan.listing import listing

IGNORED = -100  # transformers' label of a token that is given, not predicted

Example: TypeAlias = tuple[list[int], list[int]]  # input ids, and labels that are input ids or IGNORED


def mean_loss(model: Model, examples: Sequence[Example], *, pad_token: int, batch: int = 8) -> Perplexity:
    """Mean negative log-likelihood of the labels that count, each predicted from the tokens before it.

    Tokens count alike, whichever example they are from. A first label is never predicted, as in transformers' loss.

    Args:
        model: A causal language model in evaluation mode.
        examples: Input ids and labels of equal length; a label of -100 is not counted.
        pad_token: Token id for the places after a shorter sequence, masked from attention.
        batch: Sequences that go through the model together, alike in length; their logits, batch x longest x
            vocabulary in the model's dtype, are the memory that this takes.

    Raises:
        ValueError: batch is below 1, the model is in training mode, there is no example, or one is empty, too long, or
            has a token or label outside the vocabulary or labels of another length, or no label counts.
    """
    check_ready(model, batch)
    sequences = [tokens for tokens, _ in examples]
    check_sequences(model, sequences, pad_token=pad_token)
    _check_labels(examples)
    counted = [[label != IGNORED for label in labels[1:]] for _, labels in examples]
    tokens = sum(sum(row) for row in counted)
    if not tokens:
        raise ValueError(f"no label to predict: after the first token of each example all are {IGNORED}")
    nats = sum(_loss(model, [examples[i] for i in indices], pad_token) for indices in by_length(sequences, batch))
    return Perplexity(nats / tokens, tokens)


@torch.inference_mode()
def _loss(model: Model, group: list[Example], pad_token: int) -> float:
    """Sum over the labels that count, in nats."""
    tokens_NT, mask_NT = padded(model, [tokens for tokens, _ in group], pad_token)
    # From the end: prompt tuning puts virtual tokens, with logits of their own, before the text.
    logits_NTV = model(input_ids=tokens_NT, attention_mask=mask_NT, use_cache=False).logits[:, -tokens_NT.shape[1] :]
    positions = max(1, perplexity.CHUNK_ELEMENTS // logits_NTV.shape[-1])
    total = torch.zeros((), dtype=torch.float64)
    for logits_TV, (_, labels) in zip(logits_NTV, group, strict=True):
        places = [place for place, label in enumerate(labels[1:]) if label != IGNORED]
        for start in range(0, len(places), positions):
            chunk = places[start : start + positions]
            targets_P = torch.tensor([labels[place + 1] for place in chunk], device=logits_TV.device)
            total += (
                functional.cross_entropy(logits_TV[chunk].float(), targets_P, reduction="none").cpu().double().sum()
            )
    return total.item()


def _check_labels(examples: Sequence[Example]) -> None:
    uneven = [
        f"{i} ({len(labels)} for {len(tokens)})"
        for i, (tokens, labels) in enumerate(examples)
        if len(labels) != len(tokens)
    ]
    if uneven:
        raise ValueError(f"example {listing(uneven)} has labels of another number than its tokens: give one to each")
    wrong = [
        f"{i} at {place} ({label} for {token})"
        for i, example in enumerate(examples)
        for place, (token, label) in enumerate(zip(*example, strict=True))
        if label not in (token, IGNORED)
    ]
    if wrong:
        raise ValueError(f"example {listing(wrong)} has a label that is neither its token nor {IGNORED}")
