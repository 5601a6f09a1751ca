"""Perplexity of a causal language model on a text: mean negative log-likelihood and its exponential.

Shape suffixes: N = sequences of one batch, T = tokens of a sequence, P = counted predictions, V = vocabulary.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from qsvd.errors import BadInput
from qsvd.evaluate.batches import ALONE, Model, Part, Tell, check_ready, equal_lengths, tell_nobody

CHUNK_ELEMENTS = 1 << 24  # logits in float32 at one time: 64 MB
Window: TypeAlias = tuple[list[int], int]  # tokens, and the number of first predictions that are not counted


def check_window(window: int, stride: int) -> None:
    """Refuse a window below 2 tokens and a stride outside 1..window."""
    if window < 2:
        raise BadInput(f"window {window} is below 2: one token predicts the next")
    if not 1 <= stride <= window:
        raise BadInput(f"stride {stride} is outside 1..{window}, the size of the window")


def slide(tokens: list[int], window: int, stride: int) -> Iterator[Window]:
    """Yield windows of a text, each with the number of its first predictions that an earlier window has made."""
    reached = min(window, len(tokens))
    yield tokens[:reached], 0
    while reached < len(tokens):
        end = min(reached + stride, len(tokens))
        start = reached if stride == window else end - window
        # Prediction i of a window is its token i + 1; the first new token is `reached`, prediction reached - start - 1.
        yield tokens[start:end], max(reached - start - 1, 0)
        reached = end


def alike(windows: Iterable[Window], batch: int) -> Iterator[tuple[list[list[int]], int]]:
    """Yield groups of at most `batch` sequences of one length and one skip; sequences of one token are left out."""
    waiting: dict[tuple[int, int], list[list[int]]] = {}
    for tokens, skip in windows:
        if len(tokens) < 2:
            continue
        group = waiting.setdefault((len(tokens), skip), [])
        group.append(tokens)
        if len(group) == batch:
            yield waiting.pop((len(tokens), skip)), skip
    for (_, skip), group in waiting.items():
        yield group, skip


def last_predictions(model: Model, tokens_NT: Tensor, count: int) -> Tensor:
    """Return the logits [N, P, V] of the last `count` tokens, each from the tokens before it, in the model's dtype."""
    # From the end, since prompt tuning puts virtual tokens with logits before the text.
    return model(input_ids=tokens_NT, use_cache=False).logits[:, -count - 1 : -1]


@dataclass(frozen=True)
class Perplexity:
    """The mean negative log-likelihood of the predicted tokens in nats, and their number."""

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(nats); infinite if that exceeds float64."""
        try:
            return math.exp(self.nats)
        except OverflowError:
            return math.inf


def perplexity_of_documents(
    model: Model,
    documents: Iterable[list[int]],
    *,
    window: int,
    batch: int = 8,
    tell: Tell = tell_nobody,
    part: Part = ALONE,
) -> Perplexity:
    """Return the perplexity over documents, each separate: the first token is given, the others are predicted.

    Every predicted token has the same weight. A document of one token or none is skipped.

    Args:
        model: A causal language model in evaluation mode.
        documents: Token ids, with the start token if the model expects one. Read as a stream.
        window: Tokens; longer documents are cut.
        batch: Sequences of equal length of one forward pass. Their logits, batch x window x vocabulary in the model's
            dtype, take most of the memory.
        tell: Is called after every batch with the number of its predictions.
        part: Which batches this process measures; all processes return the perplexity of all.

    Raises:
        BadInput: window is below 2 or batch below 1; the model is in training mode; a token is outside its vocabulary;
            no document has a token to predict.
    """
    check_window(window, stride=window)
    check_ready(model, batch)
    return _measure(model, ((document[:window], 0) for document in documents), batch, tell, part)


def perplexity_of_text(  # noqa: PLR0913  # each is a choice of its own
    model: Model,
    tokens: list[int],
    *,
    window: int,
    stride: int,
    batch: int = 8,
    tell: Tell = tell_nobody,
    part: Part = ALONE,
) -> Perplexity:
    """Return the perplexity over one text longer than the model's context, in sliding windows.

    The first window predicts all its tokens except the first. Each later window ends `stride` tokens further, or at the
    end of the text, and predicts only the tokens after the window before it, so every token of the text except the
    first is predicted once. With stride == window the windows are disjoint, and the first token of each is not
    predicted.

    Args:
        model: A causal language model in evaluation mode.
        tokens: Token ids, with the start token if the model expects one.
        window: Tokens that the model reads at once.
        stride: Tokens from one window to the next, 1..window. Smaller is slower, and closer to full context.
        batch: Windows of equal length of one forward pass; memory as in perplexity_of_documents.
        tell: Is called after every batch with the number of its predictions.
        part: As in perplexity_of_documents.

    Raises:
        BadInput: window is below 2, stride outside 1..window or batch below 1; the model is in training mode; a token
            is outside its vocabulary; there are fewer than two tokens.
    """
    check_window(window, stride)
    check_ready(model, batch)
    return _measure(model, slide(tokens, window, stride), batch, tell, part)


def _measure(model: Model, windows: Iterable[Window], batch: int, tell: Tell, part: Part) -> Perplexity:
    """Return the mean over all counted predictions."""
    measured = []
    for group, skip in part.of(alike(windows, batch)):
        new = len(group) * (len(group[0]) - 1 - skip)
        measured.append([_negative_log_likelihood(model, group, skip), new])
        tell(new)
    measured = part.joined(measured)
    nats, count = sum(value for value, _ in measured), sum(new for _, new in measured)
    if not count:
        raise BadInput("no token to predict: every sequence has fewer than two tokens")
    return Perplexity(nats / count, count)


@torch.inference_mode()
def _negative_log_likelihood(model: Model, group: list[list[int]], skip: int) -> float:
    """Return the sum over the predictions of sequences of one length in nats, without the first `skip` of each."""
    tokens_NT = equal_lengths(model, group)
    targets_NP = tokens_NT[:, 1 + skip :]
    logits_NPV = last_predictions(model, tokens_NT, targets_NP.shape[1])
    targets_NP = targets_NP.to(logits_NPV.device)
    positions = max(1, CHUNK_ELEMENTS // logits_NPV.shape[-1])
    total = torch.zeros((), dtype=torch.float64)
    for logits_PV, targets_P in zip(logits_NPV, targets_NP, strict=True):
        for chunk, target in zip(logits_PV.split(positions), targets_P.split(positions), strict=True):
            total += functional.cross_entropy(chunk.float(), target, reduction="none").cpu().double().sum()
    return total.item()
