"""How often a sequence classifier is right.

Shape suffixes: N = sequences of one batch, T = tokens of the longest, C = classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from qsvd.evaluate.batches import Model, by_length, check_ready, check_sequences, padded
from qsvd.evaluate.share import wilson_interval
from qsvd.plan.listing import listing


@dataclass(frozen=True)
class Accuracy:
    """Examples of which the most probable class is the label; nats is the mean cross entropy of a label, in nats."""

    correct: int
    total: int
    nats: float

    @property
    def share(self) -> float:
        """Correct examples among all, 0..1."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """The share's 95% interval (Wilson)."""
        return wilson_interval(self.correct, self.total)


def accuracy(
    model: Model,
    examples: Sequence[tuple[list[int], int]],
    *,
    pad_token: int,
    batch: int = 32,
    segments: Sequence[list[int]] | None = None,
) -> Accuracy:
    """Accuracy and cross entropy of a sequence classifier; the batch size changes only the rounding.

    Args:
        model: A transformers ForSequenceClassification model, encoder or decoder, in evaluation mode.
        examples: Token ids, special tokens included, and the label of each.
        pad_token: Token id for the places after a shorter sequence, masked from attention. It must be the one in the
            model's config: decoders read the class at the last token that is not it.
        batch: Sequences that go through the model together, alike in length.
        segments: token_type_ids of each example, as many as it has tokens; None is the model's default.

    Raises:
        ValueError: batch is below 1, the model is in training mode, has fewer than two classes, another pad token or
            gives no logits [N, C], or there is no example, or one is empty, too long, or has a token or label that
            the model does not know.
    """
    check_ready(model, batch)
    sequences = [tokens for tokens, _ in examples]
    check_sequences(model, sequences, pad_token=pad_token)
    _check_classes(model, [label for _, label in examples])
    expected = model.config.get_text_config().pad_token_id
    if pad_token != expected:
        raise ValueError(
            f"pad token {pad_token} is not {expected}, the pad_token_id of the model's config, by which decoders find "
            f"the end of a text: set model.config.pad_token_id = {pad_token} or give the one it has"
        )
    correct, nats = 0, 0.0
    for indices in by_length(sequences, batch):
        types = None if segments is None else [segments[i] for i in indices]
        logits_NC = _logits(model, [sequences[i] for i in indices], pad_token, types)
        labels_N = torch.tensor([examples[i][1] for i in indices])
        correct += int((logits_NC.argmax(-1) == labels_N).sum())
        nats += functional.cross_entropy(logits_NC, labels_N, reduction="none").double().sum().item()
    return Accuracy(correct, len(examples), nats / len(examples))


@torch.inference_mode()
def _logits(model: Model, group: list[list[int]], pad_token: int, types: list[list[int]] | None) -> Tensor:
    """Float32 [N, C] on the CPU."""
    tokens_NT, mask_NT = padded(model, group, pad_token)
    inputs = {"input_ids": tokens_NT, "attention_mask": mask_NT}
    if types is not None:
        inputs["token_type_ids"] = padded(model, types, 0)[0]
    logits_NC = model(**inputs).logits
    if logits_NC.shape != (len(group), model.config.num_labels):
        raise ValueError(
            f"logits of {len(group)} texts have shape {tuple(logits_NC.shape)}, not one row of "
            f"{model.config.num_labels} classes each: load the model as AutoModelForSequenceClassification"
        )
    return logits_NC.float().cpu()


def _check_classes(model: Model, labels: list[int]) -> None:
    num_classes = len(model.config.id2label or ())
    if num_classes < 2:
        raise ValueError(f"the model has {num_classes} class, as for regression; accuracy needs 2 or more")
    bad = sorted({label for label in labels if not 0 <= label < num_classes})
    if bad:
        raise ValueError(f"label {listing([str(label) for label in bad])} is outside 0..{num_classes - 1}, the classes")
