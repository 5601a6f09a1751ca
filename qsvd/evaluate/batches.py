"""Sequences of token ids on their way into a model: checked, grouped by length, padded.

Shape suffixes: N = sequences of one batch, T = tokens of the longest.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from qsvd.errors import BadInput, listing
from qsvd.plan.weights import context_length

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

Model: TypeAlias = "PreTrainedModel | PeftModel"


def check_ready(model: Model, batch: int) -> None:
    """Refuse, by ValueError, a batch below 1 and a model in training mode."""
    if batch < 1:
        raise BadInput(f"batch {batch} is below 1, the least that goes through a model")
    if model.training:
        raise BadInput("the model is in training mode, where dropout changes what it predicts: call eval() first")


def check_sequences(model: Model, sequences: Sequence[list[int]], *, pad_token: int, room: int = 0) -> None:
    """Refuse what a model cannot read, before any of it is read: on a GPU an id out of range ends the process.

    Args:
        model: Its embedding is the vocabulary, its config's max_position_embeddings, if it has them, the longest input.
        sequences: Token ids of each example.
        pad_token: Token id that will stand where a sequence is shorter than its batch.
        room: Tokens that will be generated after each sequence.

    Raises:
        BadInput: There is no sequence, one is empty or too long, or a token or pad_token is outside the vocabulary.
    """
    if not sequences:
        raise BadInput("no examples: there is nothing to measure a model on")
    _refuse([f"{i}" for i, tokens in enumerate(sequences) if not tokens], "no token: give at least one to each")
    last = len(_embedding(model)) - 1
    bad = sorted({token for tokens in [*sequences, [pad_token]] for token in tokens if not 0 <= token <= last})
    if bad:
        raise BadInput(f"token {listing([str(token) for token in bad])} is outside 0..{last}, the model's vocabulary")
    limit = context_length(model.config)
    long = [f"{i} ({len(tokens)})" for i, tokens in enumerate(sequences) if len(tokens) + room > limit]
    generated = f", {room} of them for what is generated" if room else ""
    _refuse(long, f"more tokens than the {limit} positions of the model{generated}: shorten or drop them")


def by_length(sequences: Sequence[list[int]], batch: int) -> Iterator[list[int]]:
    """Indices of at most `batch` sequences at a time, longest first: little padding; a lack of memory shows at once."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]), reverse=True)
    for start in range(0, len(order), batch):
        yield order[start : start + batch]


def padded(model: Model, group: Sequence[list[int]], pad_token: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Tokens and attention mask, int64 [N, T] on the model's device, with the padding right or left."""
    width = max(len(tokens) for tokens in group)
    tokens_NT = torch.full((len(group), width), pad_token)
    mask_NT = torch.zeros_like(tokens_NT)
    for row, mask, tokens in zip(tokens_NT, mask_NT, group, strict=True):
        place = slice(width - len(tokens), None) if left else slice(len(tokens))
        row[place] = torch.tensor(tokens)
        mask[place] = 1
    return tokens_NT.to(model.device), mask_NT.to(model.device)


def equal_lengths(model: Model, group: Sequence[list[int]]) -> Tensor:
    """Tokens of sequences of one length, int64 [N, T] on the model's device.

    Raises:
        BadInput: A token is outside the model's vocabulary; for sequences that come as a stream, only seen here.
    """
    table = _embedding(model)
    tokens_NT = torch.tensor(group)
    low, high = (int(limit) for limit in tokens_NT.aminmax())
    if low < 0 or high >= len(table):
        offender = low if low < 0 else high
        raise BadInput(f"token {offender} is outside 0..{len(table) - 1}, the vocabulary of the model")
    return tokens_NT.to(model.device)


def _embedding(model: Model) -> Tensor:
    table = model.get_input_embeddings().weight
    assert isinstance(table, Tensor), "an embedding's weight is its table, one row per token"
    return table


def _refuse(offenders: list[str], what: str) -> None:
    if offenders:
        raise BadInput(f"example {listing(offenders)} has {what}")
