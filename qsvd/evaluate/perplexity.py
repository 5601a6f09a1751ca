"""How well a causal language model predicts a text: mean negative log-likelihood and perplexity.

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
from qsvd.evaluate.batches import Model, check_ready, equal_lengths

# Windows of a text longer than a model's context, and the logits that a model predicts in them.


Window: TypeAlias = tuple[list[int], int]  # tokens, and how many of its first predictions are not counted


def check_window(window: int, stride: int) -> None:
    """Refuse, by ValueError, a window below 2 tokens and a stride outside 1..window."""
    if window < 2:
        raise BadInput(f"window {window} is below 2, the least that holds a token and one to predict from it")
    if not 1 <= stride <= window:
        raise BadInput(f"stride {stride} is outside 1..{window}, the strides of a window of {window} tokens")


def slide(tokens: list[int], window: int, stride: int) -> Iterator[Window]:
    """Windows of a text, each with the number of its first predictions that an earlier window has made."""
    reached = min(window, len(tokens))
    yield tokens[:reached], 0
    while reached < len(tokens):
        end = min(reached + stride, len(tokens))
        start = reached if stride == window else end - window
        # Prediction i of a window is its token i + 1, so the first new one, token `reached`, is number:
        yield tokens[start:end], max(reached - start - 1, 0)
        reached = end


def alike(windows: Iterable[Window], batch: int) -> Iterator[tuple[list[list[int]], int]]:
    """Groups of at most `batch` sequences of one length and one skip, those without a prediction left out."""
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
    """Logits [N, P, V] of the last `count` tokens, each from what stands before it, in the model's dtype."""
    # From the end: prompt tuning puts virtual tokens, with logits of their own, before the text.
    return model(input_ids=tokens_NT, use_cache=False).logits[:, -count - 1 : -1]


CHUNK_ELEMENTS = 1 << 24  # logits that are float32 at one time: 64 MB


@dataclass(frozen=True)
class Perplexity:
    """What a text costs a model.

    nats is the mean negative log-likelihood of a predicted token, in nats; tokens is how many were predicted.
    """

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(nats); infinite where that exceeds float64."""
        try:
            return math.exp(self.nats)
        except OverflowError:
            return math.inf

    def bits_per_byte(self, num_bytes: int) -> float:
        """Bits for each byte of text: comparable between tokenizers, as perplexity is not.

        Args:
            num_bytes: UTF-8 bytes of the text that the predicted tokens spell.

        Raises:
            BadInput: num_bytes is below 1.
        """
        if num_bytes < 1:
            raise BadInput(f"{num_bytes} bytes of text is below 1, the least that bits per byte can be taken over")
        return self.nats * self.tokens / (math.log(2) * num_bytes)


def perplexity_of_documents(model: Model, documents: Iterable[list[int]], *, window: int, batch: int = 8) -> Perplexity:
    """Perplexity over documents, each by itself: its first token is given, the others are predicted.

    Tokens count alike, whichever document they are from. A document of one token or none adds nothing.

    Args:
        model: A causal language model in evaluation mode.
        documents: Token ids, with the start token already in front if the model expects one. Read as a stream.
        window: Tokens; what a document has beyond them is dropped.
        batch: Sequences of equal length that go through the model together; their logits, batch x window x vocabulary
            in the model's dtype, are the memory that this takes.

    Raises:
        BadInput: window is below 2 or batch below 1, the model is in training mode, a token is outside its
            vocabulary, or no document has a token to predict.
    """
    check_window(window, stride=window)
    check_ready(model, batch)
    return _measure(model, ((document[:window], 0) for document in documents), batch)


def perplexity_of_text(model: Model, tokens: list[int], *, window: int, stride: int, batch: int = 8) -> Perplexity:
    """Perplexity over one text longer than the model's context, by windows that slide.

    The first window predicts all its tokens but the first. Each later one ends `stride` tokens further, or at the end
    of the text, and predicts only the tokens that the one before it did not reach, with as many tokens before them as
    the window holds: every token but the first is predicted once. With stride == window the windows are disjoint,
    so that nothing stands before the first token of each and none of these is predicted.

    Args:
        model: A causal language model in evaluation mode.
        tokens: Token ids, with the start token already in front if the model expects one.
        window: Tokens the model sees at once.
        stride: Tokens from one window to the next, 1..window: smaller is slower, and closer to full context.
        batch: Windows of equal length that go through the model together; takes memory as above.

    Raises:
        BadInput: window is below 2, stride outside 1..window or batch below 1, the model is in training mode, a
            token is outside its vocabulary, or there are fewer than two tokens.
    """
    check_window(window, stride)
    check_ready(model, batch)
    return _measure(model, slide(tokens, window, stride), batch)


def _measure(model: Model, windows: Iterable[Window], batch: int) -> Perplexity:
    """Mean over all counted predictions; sequences wait until `batch` of one length have come."""
    nats, count = 0.0, 0
    for group, skip in alike(windows, batch):
        nats += _negative_log_likelihood(model, group, skip)
        count += len(group) * (len(group[0]) - 1 - skip)
    if not count:
        raise BadInput("no token to predict: every sequence has fewer than two tokens")
    return Perplexity(nats / count, count)


@torch.inference_mode()
def _negative_log_likelihood(model: Model, group: list[list[int]], skip: int) -> float:
    """Sum over the predictions of sequences of one length, in nats, without the first `skip` of each."""
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
