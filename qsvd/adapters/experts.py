"""Experts one by one: the stacks of a loaded model become lists of layers, and only experts that get tokens are run.

The module keeps its class of transformers, its gate function and its biases. transformers itself asks its
ExpertsInterface for the forward pass.

Shape suffixes: T = tokens, H = hidden size, K = experts of a token, N = tokens of one expert.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from qsvd.plan.experts import is_routed
from qsvd.plan.targets import FIRST, LAST

IMPLEMENTATION = "qsvd"  # its name in transformers' ExpertsInterface


def open_stack(model: nn.Module, path: str, count: int) -> None:
    """Replace a stack of experts by a list for so many layers, and let transformers run the module expert by expert."""
    owner, _, name = path.rpartition(".")
    module: Any = model.get_submodule(owner)
    if name in module._parameters:
        del module._parameters[name]
        setattr(module, name, nn.ModuleList([nn.Identity() for _ in range(count)]))
    if is_routed(module):
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, routed)
        module.config._experts_implementation = IMPLEMENTATION
    else:
        module.forward = partial(in_turn, module)


def routed(experts: Any, hidden_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Return the sum of the outputs of each token's experts [T, H], weighted; an expert without tokens is not run."""
    outputs_TH = torch.zeros_like(hidden_TH)
    for number in experts_TK.unique().tolist():
        if number < experts.num_experts:  # transformers marks places without an expert by the number of experts
            tokens_N, places_N = torch.where(experts_TK == number)
            found = _expert(experts, number, hidden_TH[tokens_N]) * weights_TK[tokens_N, places_N, None]
            outputs_TH.index_add_(0, tokens_N, found.to(outputs_TH.dtype))
    return outputs_TH


def in_turn(experts: Any, hidden_states: Tensor) -> Tensor:
    """Return the outputs [E N, H] of inputs that are sorted by expert, equally many for each."""
    parts = hidden_states.reshape(experts.num_experts, -1, hidden_states.shape[-1])
    return torch.cat([_expert(experts, number, part) for number, part in enumerate(parts)])


def _expert(experts: Any, number: int, x_NH: Tensor) -> Tensor:
    """Return the output of one expert."""
    first = next(name for name in FIRST if hasattr(experts, name))
    inner = _product(experts, first, number, x_NH)
    if hasattr(experts, "_apply_gate") and experts.has_gate:
        inner = experts._apply_gate(inner)
    elif first == FIRST[0]:
        gate, up = inner.chunk(2, dim=-1)
        inner = up * experts.act_fn(gate)
    else:
        inner = experts.act_fn(inner)
    return _product(experts, LAST, number, inner)


def _product(experts: Any, name: str, number: int, x_NI: Tensor) -> Tensor:
    stack, bias = getattr(experts, name), getattr(experts, f"{name}_bias", None)
    bias = None if bias is None else bias[number]
    if isinstance(stack, nn.ModuleList):
        y_NO = stack[number](x_NI)
        return y_NO if bias is None else y_NO + bias
    weight = stack[number].T if getattr(experts, "is_transposed", False) else stack[number]
    return linear(x_NI, weight, bias)
