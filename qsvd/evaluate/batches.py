"""Batches of token ids for a model: checked, grouped by length, padded.

Shape suffixes: N = sequences of one batch, T = tokens of the longest.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from qsvd import ranks
from qsvd.errors import BadInput, listing
from qsvd.plan.weights import context_length

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

Model: TypeAlias = "PreTrainedModel | PeftModel"
Tell: TypeAlias = Callable[[int], None]  # is called after every batch with the number of its predictions or examples


T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """The batches that one of several processes measures: every `size`-th, from number `rank` on."""

    rank: int = 0
    size: int = 1

    def of(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches of this process."""
        return islice(batches, self.rank, None, self.size)

    def joined(self, values: list[Any]) -> list[Any]:
        """Return the values of the batches of all processes, JSON-able, in the order of the batches.

        Sums over them are to the bit those of one process.
        """
        return values if self.size == 1 else _in_turns(ranks.gather(values))

    def joined_arrays(self, arrays: list[Tensor], rows: int) -> Tensor:
        """Return the arrays of the batches of all processes side by side, float64 [rows, ...], in the same order."""
        mine = torch.cat(arrays, dim=1) if arrays else torch.zeros(rows, 0, dtype=torch.float64)
        if self.size == 1:
            return mine
        widths = ranks.gather([array.shape[1] for array in arrays])
        sent = ranks.gather_bytes(mine.contiguous().numpy().tobytes())
        whole = [torch.frombuffer(bytearray(part), dtype=torch.float64).view(rows, -1) for part in sent if part]
        split = [one.split(width, dim=1) for one, width in zip(whole, filter(None, widths), strict=True)]
        return torch.cat(_in_turns(split), dim=1) if split else mine


ALONE = Part()


def every_process() -> Part:
    """Return the part of this process, where all processes of the command measure together."""
    return Part(ranks.rank(), ranks.size())


def _in_turns(parts: Sequence[Sequence[T]]) -> list[T]:
    """Return the values of processes that took turns, the first process first."""
    most = max(map(len, parts), default=0)
    return [part[turn] for turn in range(most) for part in parts if turn < len(part)]


def tell_nobody(count: int) -> None:
    """Tell no one how much is done."""
    del count


def check_ready(model: Model, batch: int) -> None:
    """Refuse a batch below 1 and a model in training mode."""
    if batch < 1:
        raise BadInput(f"batch {batch} is below 1")
    if model.training:
        raise BadInput("the model is in training mode, in which dropout changes its predictions: call eval() first")


def check_sequences(model: Model, sequences: Sequence[list[int]], *, pad_token: int, room: int = 0) -> None:
    """Refuse sequences that the model cannot read: on a GPU a token id out of range would end the process.

    Args:
        sequences: Token ids of each example.
        pad_token: Token id that will fill shorter sequences.
        room: Tokens that will be generated after each sequence.

    Raises:
        BadInput: there is no sequence; a sequence is empty or too long; a token or pad_token is outside the vocabulary.
    """
    if not sequences:
        raise BadInput("no examples to measure a model on")
    _refuse([f"{i}" for i, tokens in enumerate(sequences) if not tokens], "no token: give at least one to each")
    last = len(_embedding(model)) - 1
    bad = sorted({token for tokens in [*sequences, [pad_token]] for token in tokens if not 0 <= token <= last})
    if bad:
        raise BadInput(f"token {listing([str(token) for token in bad])} is outside 0..{last}, the model's vocabulary")
    limit = context_length(model.config)
    long = [f"{i} ({len(tokens)})" for i, tokens in enumerate(sequences) if len(tokens) + room > limit]
    generated = f", {room} of them for the generated text" if room else ""
    _refuse(long, f"more tokens than the {limit} positions of the model{generated}: shorten or drop them")


def by_length(sequences: Sequence[list[int]], batch: int) -> Iterator[list[int]]:
    """Yield indices of at most `batch` sequences, longest first: little padding, and a lack of memory shows at once."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]), reverse=True)
    for start in range(0, len(order), batch):
        yield order[start : start + batch]


def padded(model: Model, group: Sequence[list[int]], pad_token: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Return tokens and attention mask, int64 [N, T] on the model's device, padded on the right or left."""
    width = max(len(tokens) for tokens in group)
    tokens_NT = torch.full((len(group), width), pad_token)
    mask_NT = torch.zeros_like(tokens_NT)
    for row, mask, tokens in zip(tokens_NT, mask_NT, group, strict=True):
        place = slice(width - len(tokens), None) if left else slice(len(tokens))
        row[place] = torch.tensor(tokens)
        mask[place] = 1
    return tokens_NT.to(model.device), mask_NT.to(model.device)


def equal_lengths(model: Model, group: Sequence[list[int]]) -> Tensor:
    """Return sequences of one length, int64 [N, T] on the model's device.

    Raises:
        BadInput: a token is outside the model's vocabulary (a stream of sequences cannot be checked before).
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
    assert isinstance(table, Tensor), "the weight of an embedding has one row per token"
    return table


def _refuse(offenders: list[str], what: str) -> None:
    if offenders:
        raise BadInput(f"example {listing(offenders)} has {what}")
