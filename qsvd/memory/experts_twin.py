"""The stand-in on the meta device for experts that are run one by one (adapters/experts.py)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qsvd.memory.twins import LinearTwin


class ExpertsTwin(nn.Module):
    """Experts in the worst case: all tokens have the same ones, so that each of these holds all tokens.

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
