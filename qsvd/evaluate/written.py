"""The loss of an encoder-decoder model on what its decoder should write.

Shape suffixes: N = sequences of one batch, T = tokens of the longest, V = vocabulary.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from qsvd.errors import BadInput
from qsvd.evaluate.accuracy import Collate
from qsvd.evaluate.batches import ALONE, Model, Part, Tell, by_length, check_ready, check_sequences, padded, tell_nobody
from qsvd.evaluate.perplexity import Perplexity

NOT_COUNTED = -100


def written_loss(  # noqa: PLR0913  # each is a choice of its own
    model: Model,
    sources: Sequence[list[int]],
    targets: Sequence[list[int]],
    *,
    pad_token: int,
    batch: int = 8,
    tell: Tell = tell_nobody,
    collate: Collate | None = None,
    part: Part = ALONE,
) -> Perplexity:
    """Return the mean negative log-likelihood of all target tokens, each from the source and the tokens before it.

    Args:
        model: An encoder-decoder model in evaluation mode.
        sources, targets: Token ids of each example.
        pad_token: Token id that fills shorter sequences, masked from attention.
        batch: Examples of one forward pass.
        tell: Is called after every batch with the number of its examples.
        collate: Returns what the encoder reads of the examples with these numbers, if that is not tokens.
        part: Which batches this process measures; all processes return the loss of all.

    Raises:
        BadInput: batch is below 1; the model is in training mode; there is no example; an example is empty, too long or
            has a token outside the vocabulary; there are not as many targets as sources.
    """
    check_ready(model, batch)
    if len(sources) != len(targets):
        raise BadInput(f"{len(sources)} sources have {len(targets)} targets: give one to each")
    for sequences in (sources, targets):
        check_sequences(model, sequences, pad_token=pad_token)
    measured = []
    for indices in part.of(by_length(sources, batch)):
        if collate is None:
            tokens_NT, mask_NT = padded(model, [sources[i] for i in indices], pad_token)
            inputs = {"input_ids": tokens_NT, "attention_mask": mask_NT}
        else:
            made = {name: value for name, value in collate(indices).items() if name != "labels"}
            inputs = {n: x.to(model.device, model.dtype if x.is_floating_point() else x.dtype) for n, x in made.items()}
        measured.append(_loss(model, inputs, [targets[i] for i in indices], pad_token))
        tell(len(indices))
    tokens = sum(map(len, targets))
    return Perplexity(sum(part.joined(measured)) / tokens, tokens)


@torch.inference_mode()
def _loss(model: Model, inputs: Mapping[str, Tensor], targets: list[list[int]], pad_token: int) -> float:
    """Return the sum over the target tokens, in nats. The decoder reads the targets one place to the right."""
    written_NT, counted_NT = padded(model, targets, pad_token)
    labels_NT = written_NT.masked_fill(counted_NT == 0, NOT_COUNTED)
    logits_NTV = model(**inputs, labels=labels_NT, use_cache=False).logits
    total = torch.zeros((), dtype=torch.float64)
    for logits_TV, labels_T in zip(logits_NTV, labels_NT, strict=True):
        each = functional.cross_entropy(logits_TV.float(), labels_T, reduction="none", ignore_index=NOT_COUNTED)
        total += each.cpu().double().sum()
    return total.item()
