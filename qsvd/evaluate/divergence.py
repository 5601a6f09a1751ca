"""KL divergence of a model's predictions from those of its 16-bit model, as llama.cpp measures it.

Shape suffixes: P = predictions, V = vocabulary, K = values of one prediction.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from qsvd.errors import BadInput
from qsvd.evaluate.batches import ALONE, Model, Part, Tell, check_ready, equal_lengths, tell_nobody
from qsvd.evaluate.perplexity import Window, alike, check_window, last_predictions, slide

CHUNK_ELEMENTS = 1 << 22  # logits in float64 at one time: five arrays of 32 MB
VALUES = 4  # of one prediction, see `_values`


@dataclass(frozen=True)
class Divergence:
    """Kullback-Leibler divergence KL(reference || model) of the predicted tokens, in nats.

    An _error is the standard error of a mean, as if tokens were independent. Percentiles are of the divergence of a
    token, interpolated linearly. top_token_agreement is the share of tokens, 0..1, for which both models find the same
    token most probable. nats_model and nats_reference are mean negative log-likelihoods; perplexity is exp of them.
    """

    mean: float
    mean_error: float
    median: float
    percentile_90: float
    percentile_95: float
    percentile_99: float
    maximum: float
    top_token_agreement: float
    top_token_agreement_error: float
    nats_model: float
    nats_reference: float
    log_perplexity_ratio_error: float
    tokens: int

    @property
    def log_perplexity_ratio(self) -> float:
        """ln(perplexity of the model / perplexity of the reference), in nats."""
        return self.nats_model - self.nats_reference


def divergence_of_text(  # noqa: PLR0913  # each is a choice of its own
    model: Model,
    reference: Model,
    tokens: list[int],
    *,
    window: int,
    stride: int,
    batch: int = 8,
    tell: Tell = tell_nobody,
    part: Part = ALONE,
) -> Divergence:
    """Return KL(reference || model) of every predicted token of a text, in windows as in perplexity_of_text.

    The statistics are those of llama.cpp's `llama-perplexity --kl-divergence` (tools/perplexity/perplexity.cpp).
    llama.cpp counts the second half of disjoint windows and stores 16-bit log-probabilities of the reference; here
    windows slide, both models run together, and the divergence is computed in float64.

    Args:
        model: A causal language model in evaluation mode.
        reference: The model to compare with, of the same vocabulary, on any device.
        tokens: Token ids, with the start token if the models expect one.
        window: Tokens that a model reads at once.
        stride: Tokens from one window to the next, 1..window.
        batch: Windows of equal length of one forward pass. The logits of both models take most of the memory.
        tell: Is called after every batch with the number of its predictions.
        part: Which batches this process measures; all processes return the divergence over all.

    Raises:
        BadInput: window is below 2, stride outside 1..window or batch below 1; a model is in training mode; the
            vocabularies differ in size; a token is outside them; fewer than two tokens are predicted.
    """
    check_window(window, stride)
    return _measure(model, reference, slide(tokens, window, stride), batch, tell, part)


def divergence_of_documents(  # noqa: PLR0913  # each is a choice of its own
    model: Model,
    reference: Model,
    documents: Iterable[list[int]],
    *,
    window: int,
    batch: int = 8,
    tell: Tell = tell_nobody,
    part: Part = ALONE,
) -> Divergence:
    """Return the divergence over documents, each separate and cut at the window, as in perplexity_of_documents."""
    check_window(window, stride=window)
    return _measure(model, reference, ((document[:window], 0) for document in documents), batch, tell, part)


def _measure(  # what is measured, and how
    model: Model, reference: Model, windows: Iterable[Window], batch: int, tell: Tell, part: Part
) -> Divergence:
    check_ready(model, batch)
    check_ready(reference, batch)
    sizes = [each.config.get_text_config().vocab_size for each in (model, reference)]
    if sizes[0] != sizes[1]:
        raise BadInput(
            f"the model predicts over {sizes[0]} tokens and the reference over {sizes[1]}: "
            "compare a model with the one it was made from"
        )
    measured = []
    for group, skip in part.of(alike(windows, batch)):
        measured.append(_compare(model, reference, group, skip))
        tell(measured[-1].shape[1])
    values_KP = part.joined_arrays(measured, rows=VALUES)
    count = values_KP.shape[1]
    if count < 2:
        raise BadInput(f"predicted tokens: {count}, too few to compare two models: a standard error needs 2")
    return _summary(values_KP.numpy())


@torch.inference_mode()
def _compare(model: Model, reference: Model, group: list[list[int]], skip: int) -> Tensor:
    """Return _values, float64 [K, P] on the CPU, of sequences of one length without the first `skip` predictions."""
    tokens_NT = equal_lengths(model, group)
    targets_NP = tokens_NT[:, 1 + skip :]
    count = targets_NP.shape[1]
    ours_NPV = last_predictions(model, tokens_NT, count)
    theirs_NPV = last_predictions(reference, equal_lengths(reference, group), count)
    positions = max(1, CHUNK_ELEMENTS // ours_NPV.shape[-1])
    parts = []
    for rows in zip(ours_NPV, theirs_NPV, targets_NP, strict=True):
        for ours_PV, theirs_PV, targets_P in zip(*(row.split(positions) for row in rows), strict=True):
            parts.append(_values(ours_PV, theirs_PV.to(ours_PV.device), targets_P.to(ours_PV.device)).cpu())
    return torch.cat(parts, dim=1)


def _values(ours_PV: Tensor, theirs_PV: Tensor, targets_P: Tensor) -> Tensor:
    """Return divergence, negative log-likelihoods of model and reference, and 1 for equal top tokens, float64 [4, P].

    Float64, because the divergence is a small difference of large log-probabilities.
    """
    log_q_PV, log_p_PV = ours_PV.double().log_softmax(-1), theirs_PV.double().log_softmax(-1)
    p_PV = log_p_PV.exp()
    # 0 ln 0 = 0; a NaN is not equal to 0 and stays a NaN.
    divergence_P = torch.where(p_PV == 0, 0.0, p_PV * (log_p_PV - log_q_PV)).sum(-1)
    nats = [-log_PV.gather(-1, targets_P[:, None])[:, 0] for log_PV in (log_q_PV, log_p_PV)]
    return torch.stack([divergence_P, *nats, (ours_PV.argmax(-1) == theirs_PV.argmax(-1)).double()])


def _summary(values_KP: numpy.ndarray) -> Divergence:
    divergence_P, model_P, reference_P, agree_P = values_KP
    tokens = len(divergence_P)
    median, p90, p95, p99 = (float(value) for value in numpy.percentile(divergence_P, [50, 90, 95, 99]))
    return Divergence(
        mean=float(divergence_P.mean()),
        mean_error=_standard_error(divergence_P),
        median=median,
        percentile_90=p90,
        percentile_95=p95,
        percentile_99=p99,
        maximum=float(divergence_P.max()),
        top_token_agreement=float(agree_P.mean()),
        top_token_agreement_error=_standard_error(agree_P),
        nats_model=float(model_P.mean()),
        nats_reference=float(reference_P.mean()),
        # llama.cpp adds both variances and subtracts the covariance twice: the variance of the difference.
        log_perplexity_ratio_error=_standard_error(model_P - reference_P),
        tokens=tokens,
    )


def _standard_error(values_P: numpy.ndarray) -> float:
    return float(values_P.std(ddof=1) / len(values_P) ** 0.5)
