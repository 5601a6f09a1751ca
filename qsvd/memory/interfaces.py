"""Stand-ins on the meta device for what transformers runs through its interfaces: attention, its masks, and experts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd import Function

from qsvd.memory.twins import LinearTwin


class ExpertsTwin(nn.Module):
    """Experts that run one by one (adapters/experts.py), in the worst case: all tokens have the same ones.

    Args:
        experts: The module of transformers, for its gate function.
        first, last: Twins of its projections, by expert.
    """

    def __init__(self, experts: Any, first: Sequence[LinearTwin], last: Sequence[LinearTwin]):
        super().__init__()
        self._experts = (experts,)  # in a tuple: its parameters are not those of this module
        self._pairs = tuple(zip(first, last, strict=True))
        self.layers = nn.ModuleList([*first, *last])

    def forward(self, hidden: Tensor, chosen: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Return outputs for hidden states, the experts of each token and their weights, as in transformers."""
        if chosen is None or weights is None:  # one input for each expert
            parts = hidden.reshape(len(self._pairs), -1, hidden.shape[-1])
            return torch.cat([self._expert(number, part) for number, part in enumerate(parts)])
        outputs = torch.zeros_like(hidden)
        busy = min(chosen.shape[-1], len(self._pairs))
        for number in range(len(self._pairs) if self._is_trained else busy):  # every trained one gets gradients
            rows = torch.empty(len(hidden) if number < busy else 0, dtype=torch.long, device=hidden.device)
            found = self._expert(number, hidden[rows]) * weights[: len(rows), :1]
            outputs.index_add_(0, rows, found.to(outputs.dtype))
        return outputs

    @property
    def _is_trained(self) -> bool:
        return any(parameter.requires_grad for parameter in self.layers.parameters())

    def _expert(self, number: int, x: Tensor) -> Tensor:
        (first, last), (experts,) = self._pairs[number], self._experts
        inner = first(x)
        if getattr(experts, "has_gate", False):
            inner = experts._apply_gate(inner)
        elif inner.shape[-1] == last.decoding.shape[1]:
            inner = experts.act_fn(inner)
        else:
            gate, up = inner.chunk(2, dim=-1)
            inner = up * experts.act_fn(gate)
        return last(inner)


# Attention for the meta device. It keeps what the fused kernels keep: q, k, v, the output and log-sum-exps.

PLAIN, MASKED, WHOLE = "qsvd_plain", "qsvd_masked", "qsvd_whole"
CPU = "_cpu"  # at the end of the names of the first two: torch's CPU kernels have no dropout
NO_EXPERTS = "qsvd_no_experts"


def register_attention() -> None:
    """Register the kinds of attention with transformers, and the masks that it makes for them.

    PLAIN is for sequences of equal length, MASKED for padded or packed ones. WHOLE holds the T x T matrix, as
    transformers' eager attention does for models that its fused kernels cannot run.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.moe import ExpertsInterface
    from transformers.masking_utils import eager_mask, sdpa_mask

    padded_mask: Any = partial(_padded, sdpa_mask)
    kinds: dict[str, tuple[Any, Any]] = {WHOLE: (_whole, eager_mask)}
    for name, mask in ((PLAIN, sdpa_mask), (MASKED, padded_mask)):
        kinds |= {name: (_fused, mask), name + CPU: (_on_cpu, mask)}
    for name, (attention, mask) in kinds.items():
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, mask)
    ExpertsInterface.register(NO_EXPERTS, _no_experts)


def _padded(make: Callable[..., Any], **options: Any) -> Tensor:
    """Return the mask of sequences that are padded: one of its own for each, whatever attention could do without."""
    mask = make(**options | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    return mask.contiguous()


@contextmanager
def unpacked() -> Iterator[None]:
    """Let transformers look for no packed sequences, which it finds by the values of position ids."""
    with patch("transformers.masking_utils.find_packed_sequence_indices", lambda *_: None):
        yield


def _no_experts(module: nn.Module, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    """Return an output of experts that are not run: they look at the numbers of the router, and need bfloat16."""
    del module
    return hidden * 1.0


def _fused(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """With a mask the kernels do not group heads, and add the mask as a matrix in the dtype of the query."""
    del module
    bias = None
    if attention_mask is not None:
        key, value = _repeated(key, query), _repeated(value, query)
        bias = query.new_empty(len(query), 1, query.shape[2], key.shape[2])
    output = _Fused.apply(query, key, value, bias)
    assert isinstance(output, Tensor), "apply returns what forward does"
    return output.transpose(1, 2).contiguous(), None


def _on_cpu(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """With dropout torch itself makes the T x T matrices, here as well."""
    if not options.get("dropout"):
        return _fused(module, query, key, value, attention_mask)
    key, value = _repeated(key, query), _repeated(value, query)
    is_causal = attention_mask is None and getattr(module, "is_causal", True)
    found = nn.functional.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout_p=options["dropout"], is_causal=is_causal
    )
    return found.transpose(1, 2).contiguous(), None


def _whole(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    del module
    key, value = _repeated(key, query), _repeated(value, query)
    scores = torch.matmul(query, key.transpose(2, 3)) * 1.0
    if options.get("softcap") is not None:
        scores = torch.tanh(scores / options["softcap"]) * options["softcap"]
    if attention_mask is not None:
        scores = scores + attention_mask
    shares = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(shares, value).transpose(1, 2).contiguous(), shares


def _repeated(key: Tensor, query: Tensor) -> Tensor:
    heads, groups = query.shape[1], key.shape[1]
    return key if heads == groups else key.repeat_interleave(heads // groups, dim=1)


class _Fused(Function):
    """softmax(q k^T) v without the T x T matrix."""

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
