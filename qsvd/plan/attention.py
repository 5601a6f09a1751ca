"""An attention for the meta device that keeps what the fused kernels keep: q, k, v, the output and log-sum-exps.

Shape suffixes: B = sequences, H = heads, T = tokens, D = width of a head.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

PLAIN, MASKED, WHOLE = "qsvd_plain", "qsvd_masked", "qsvd_whole"


def register() -> None:
    """Make the kinds known to transformers; none of them is given a mask, they make their own.

    PLAIN is one sequence or several of equal length, MASKED has padding or packed sequences, and WHOLE holds the
    T x T matrix, as transformers' eager attention does for models that its fused kernels cannot do.
    """
    from transformers import AttentionInterface

    kinds: dict[str, Callable[..., Any]] = {PLAIN: _plain, MASKED: _masked, WHOLE: _whole}
    for name, kind in kinds.items():
        AttentionInterface.register(name, kind)


def _plain(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **_: Any
) -> tuple[Tensor, None]:
    del module, attention_mask
    output = _Fused.apply(query, key, value, None)
    assert isinstance(output, Tensor), "apply returns what forward does"
    return output.transpose(1, 2).contiguous(), None


def _masked(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **_: Any
) -> tuple[Tensor, None]:
    """The kernels do not group heads where there is a mask, and add it as a matrix in the dtype of the query."""
    del module, attention_mask
    key, value = _repeated(key, query), _repeated(value, query)
    bias = query.new_empty(len(query), 1, query.shape[2], key.shape[2])
    output = _Fused.apply(query, key, value, bias)
    assert isinstance(output, Tensor), "apply returns what forward does"
    return output.transpose(1, 2).contiguous(), None


def _whole(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    del module, attention_mask
    key, value = _repeated(key, query), _repeated(value, query)
    scores = torch.matmul(query, key.transpose(2, 3)) * 1.0
    if options.get("softcap") is not None:
        scores = torch.tanh(scores / options["softcap"]) * options["softcap"]
    scores = scores + query.new_empty(len(query), 1, query.shape[2], key.shape[2])
    shares = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(shares, value).transpose(1, 2).contiguous(), shares


def _repeated(key: Tensor, query: Tensor) -> Tensor:
    heads, groups = query.shape[1], key.shape[1]
    return key if heads == groups else key.repeat_interleave(heads // groups, dim=1)


class _Fused(Function):
    """softmax(q k^T) v without the matrix."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        sequences, heads, tokens = query.shape[:3]
        output = query.new_empty(sequences, tokens, heads, value.shape[-1]).transpose(1, 2)
        sums = query.new_empty(sequences, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, bias, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value = ctx.saved_tensors[:3]
        return *(torch.empty_like(one) for one in (query, key, value)), None
