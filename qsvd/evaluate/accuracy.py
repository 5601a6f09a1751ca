"""Accuracy of a sequence classifier, and the loss of a language model on labelled tokens.

Shape suffixes: N = sequences of one batch, T = tokens of the longest, C = classes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from qsvd.data.columns import UNTRAINED
from qsvd.errors import BadInput, listing
from qsvd.evaluate import perplexity
from qsvd.evaluate.batches import ALONE, Model, Part, Tell, by_length, check_ready, check_sequences, padded, tell_nobody
from qsvd.evaluate.perplexity import Perplexity

NORMAL_975 = 1.959963984540054  # 97.5 % quantile of the normal distribution, for a two-sided 95 % interval


def wilson_interval(count: int, total: int) -> tuple[float, float]:
    """Return the 95 % score interval of a share, within 0..1 (Wilson 1927, JASA 22, page 209).

    Args:
        count: Examples with the property, 0..total.
        total: Examples, at least 1, independent of each other.
    """
    assert 0 <= count <= total, "count is a part of total"
    assert total, "callers refuse a measure without examples"
    share, squared = count / total, NORMAL_975**2
    middle = (count + squared / 2) / (total + squared)
    half = NORMAL_975 / (total + squared) * math.sqrt(total * share * (1 - share) + squared / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Counted:
    """A number of correct examples out of all."""

    correct: int
    total: int

    @property
    def share(self) -> float:
        """Correct examples over all, 0..1."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the share (Wilson)."""
        return wilson_interval(self.correct, self.total)


@dataclass(frozen=True)
class Accuracy(Counted):
    """Examples whose most probable class is the label; nats is the mean cross entropy per label."""

    nats: float


def accuracy(  # noqa: PLR0913  # each is a choice of its own
    model: Model,
    examples: Sequence[tuple[list[int], int]],
    *,
    pad_token: int,
    batch: int = 32,
    segments: Sequence[list[int]] | None = None,
    tell: Tell = tell_nobody,
    part: Part = ALONE,
) -> Accuracy:
    """Return accuracy and cross entropy of a sequence classifier; the batch size changes only the rounding.

    Args:
        model: A transformers ForSequenceClassification model, encoder or decoder, in evaluation mode.
        examples: Token ids, special tokens included, and the label of each.
        pad_token: Token id that fills shorter sequences, masked from attention. It must be that of the model's config:
            decoders read the class at the last token that is not padding.
        batch: Sequences of one forward pass, of similar length.
        segments: token_type_ids of each example, one per token; None is the model's default.
        tell: Is called after every batch with the number of its examples.
        part: Which batches this process measures; all processes return the accuracy on all.

    Raises:
        BadInput: batch is below 1; the model is in training mode, has fewer than two classes or another pad token, or
            its logits are not [N, C]; there is no example; an example is empty, too long, or has an unknown token or
            label.
    """
    check_ready(model, batch)
    sequences = [tokens for tokens, _ in examples]
    check_sequences(model, sequences, pad_token=pad_token)
    _check_classes(model, [label for _, label in examples])
    expected = model.config.get_text_config().pad_token_id
    if pad_token != expected:
        raise BadInput(
            f"pad token {pad_token} is not {expected}, the pad_token_id of the model's config, by which decoders find "
            f"the end of a text: set model.config.pad_token_id = {pad_token}, or give that pad token"
        )
    measured = []
    for indices in part.of(by_length(sequences, batch)):
        types = None if segments is None else [segments[i] for i in indices]
        logits_NC = _logits(model, [sequences[i] for i in indices], pad_token, types)
        labels_N = torch.tensor([examples[i][1] for i in indices])
        nats = functional.cross_entropy(logits_NC, labels_N, reduction="none").double().sum().item()
        measured.append([int((logits_NC.argmax(-1) == labels_N).sum()), nats])
        tell(len(indices))
    measured = part.joined(measured)
    total = sum(nats for _, nats in measured)
    return Accuracy(sum(correct for correct, _ in measured), len(examples), total / len(examples))


@torch.inference_mode()
def _logits(model: Model, group: list[list[int]], pad_token: int, types: list[list[int]] | None) -> Tensor:
    """Return logits, float32 [N, C] on the CPU."""
    tokens_NT, mask_NT = padded(model, group, pad_token)
    inputs = {"input_ids": tokens_NT, "attention_mask": mask_NT}
    if types is not None:
        inputs["token_type_ids"] = padded(model, types, 0)[0]
    logits_NC = model(**inputs).logits
    if logits_NC.shape != (len(group), model.config.num_labels):
        raise BadInput(
            f"logits of {len(group)} texts have shape {tuple(logits_NC.shape)}, not one row of "
            f"{model.config.num_labels} classes each: load the model as AutoModelForSequenceClassification"
        )
    return logits_NC.float().cpu()


def _check_classes(model: Model, labels: list[int]) -> None:
    num_classes = len(model.config.id2label or ())
    if num_classes < 2:
        raise BadInput(f"the model has {num_classes} class, as for regression; accuracy needs 2 or more")
    bad = sorted({label for label in labels if not 0 <= label < num_classes})
    if bad:
        raise BadInput(f"label {listing([str(label) for label in bad])} is outside 0..{num_classes - 1}, the classes")


# Loss of a language model on the labelled tokens of examples: answers, not questions.


Example: TypeAlias = tuple[list[int], list[int]]  # input ids, and labels that are input ids or UNTRAINED
Collate: TypeAlias = Callable[[list[int]], Mapping[str, Tensor]]


def mean_loss(  # noqa: PLR0913  # each is a choice of its own
    model: Model,
    examples: Sequence[Example],
    *,
    pad_token: int,
    batch: int = 8,
    tell: Tell = tell_nobody,
    collate: Collate | None = None,
    part: Part = ALONE,
) -> Perplexity:
    """Return the mean negative log-likelihood of the labelled tokens, each predicted from the tokens before it.

    Every labelled token has the same weight. The first label is never predicted, as in transformers' loss.

    Args:
        model: A causal language model in evaluation mode.
        examples: Input ids and labels of equal length; a label of -100 is not counted.
        pad_token: Token id that fills shorter sequences, masked from attention.
        batch: Sequences of one forward pass, of similar length. Their logits, batch x longest x vocabulary in the
            model's dtype, take most of the memory.
        tell: Is called after every batch with the number of its examples.
        collate: Returns what the model reads of the examples with these numbers, padded on the right, where that is
            more than tokens.
        part: Which batches this process measures; all processes return the loss of all.

    Raises:
        BadInput: batch is below 1; the model is in training mode; there is no example; an example is empty, too long,
            or has a token outside the vocabulary, a wrong label or another number of labels; no token is labelled.
    """
    check_ready(model, batch)
    sequences = [tokens for tokens, _ in examples]
    check_sequences(model, sequences, pad_token=pad_token)
    _check_labels(examples)
    counted = [[label != UNTRAINED for label in labels[1:]] for _, labels in examples]
    total = sum(sum(row) for row in counted)
    if not total:
        raise BadInput(f"no label to predict: all labels after the first of each example are {UNTRAINED}")
    measured = []
    for indices in part.of(by_length(sequences, batch)):
        group = [examples[i] for i in indices]
        if collate is None:
            tokens_NT, mask_NT = padded(model, [tokens for tokens, _ in group], pad_token)
            inputs = {"input_ids": tokens_NT, "attention_mask": mask_NT}
        else:
            inputs = {name: x.to(model.device) for name, x in collate(indices).items() if name != "labels"}
        measured.append(_loss(model, group, inputs))
        tell(len(indices))
    return Perplexity(sum(part.joined(measured)) / total, total)


@torch.inference_mode()
def _loss(model: Model, group: list[Example], inputs: Mapping[str, Tensor]) -> float:
    """Return the sum over the labelled tokens, in nats."""
    # From the end, since prompt tuning puts virtual tokens with logits before the text.
    logits_NTV = model(**inputs, use_cache=False).logits[:, -inputs["input_ids"].shape[1] :]
    positions = max(1, perplexity.CHUNK_ELEMENTS // logits_NTV.shape[-1])
    total = torch.zeros((), dtype=torch.float64)
    for logits_TV, (_, labels) in zip(logits_NTV, group, strict=True):
        places = [place for place, label in enumerate(labels[1:]) if label != UNTRAINED]
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
        raise BadInput(f"example {listing(uneven)} has another number of labels than of tokens: give one label a token")
    wrong = [
        f"{i} at {place} ({label} for {token})"
        for i, example in enumerate(examples)
        for place, (token, label) in enumerate(zip(*example, strict=True))
        if label not in (token, UNTRAINED)
    ]
    if wrong:
        raise BadInput(f"example {listing(wrong)} has a label that is neither its token nor {UNTRAINED}")
