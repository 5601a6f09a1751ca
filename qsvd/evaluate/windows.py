"""Windows of a text longer than a model's context, and the logits that a model predicts in them.

Shape suffixes: N = sequences of one batch, T = tokens of a sequence, P = counted predictions, V = vocabulary.
"""

from collections.abc import Iterable, Iterator
from typing import TypeAlias

from torch import Tensor

from qsvd.evaluate.batches import Model

Window: TypeAlias = tuple[list[int], int]  # tokens, and how many of its first predictions are not counted


def check_window(window: int, stride: int) -> None:
    """Refuse, by ValueError, a window below 2 tokens and a stride outside 1..window."""
    if window < 2:
        raise ValueError(f"window {window} is below 2, the least that holds a token and one to predict from it")
    if not 1 <= stride <= window:
        raise ValueError(f"stride {stride} is outside 1..{window}, the strides of a window of {window} tokens")


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
