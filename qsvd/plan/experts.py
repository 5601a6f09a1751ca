"""Experts that transformers keeps as stacks: one 3-D parameter for each projection, with a matrix for each expert."""

from collections.abc import Iterator
from dataclasses import dataclass
from inspect import signature

from torch import nn

from qsvd.plan.targets import FIRST, LAST


@dataclass(frozen=True)
class Stack:
    """A stack of experts.

    Args:
        path: Of the parameter in the model, "model.layers.0.mlp.experts.down_proj".
        shape: [O, I] of one expert.
        count: Number of experts.
        is_transposed: Whether the parameter holds the matrices as [I, O].
    """

    path: str
    shape: tuple[int, int]
    count: int
    is_transposed: bool


def stacks_of(path: str, module: nn.Module) -> Iterator[Stack]:
    """Yield the stacks of a module whose experts can be run one by one; see adapters/experts.py.

    Args:
        path: Of the module in the model.
    """
    names = [name for name, p in module.named_parameters(recurse=False) if p.ndim == 3 and name in (*FIRST, LAST)]
    if len(names) != 2 or LAST not in names or not (is_routed(module) or is_sorted(module)):
        return
    first, last = ((*module.get_parameter(name).shape,) for name in sorted(names, reverse=True))
    is_transposed = getattr(module, "is_transposed", first[2] != last[1])
    for name in names:
        count, rows, columns = module.get_parameter(name).shape
        shape = (columns, rows) if is_transposed else (rows, columns)
        yield Stack(f"{path}.{name}", shape, count, is_transposed)


def is_routed(module: nn.Module) -> bool:
    """Return whether transformers runs the module through its ExpertsInterface: hidden states, experts, weights."""
    return hasattr(module, "_apply_gate") and getattr(module, "has_post_expert_norm", None) is False


def is_sorted(module: nn.Module) -> bool:
    """Return whether the module takes one input for each expert, equally many tokens for each, as in Llama 4."""
    return list(signature(module.forward).parameters) == ["hidden_states"] and hasattr(module, "act_fn")
