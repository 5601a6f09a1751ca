"""Second moments of the inputs of the layers of one block, and of the gradients at their outputs.

Hooks on the layers see the tensors while the block runs. Layers that get the same tensor (q, k, v; gate, up) share one
moment of their inputs.

Shape suffixes: T = tokens, O = out features, I = in features.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qsvd.calibrate.sums import LEAST_OF_MEAN
from qsvd.decompose.moments import Moments
from qsvd.decompose.objective import PLAIN, Objective
from qsvd.errors import BadInput
from qsvd.plan.weights import WeightSpec


@dataclass
class BlockMoments:
    """Sums of one block over all examples, float32 on the device; of gradients where the block is differentiated.

    Args:
        block: The module of the block, at `path` of the model.
        weights: Those that need statistics.
    """

    block: nn.Module
    path: str
    weights: Sequence[WeightSpec]
    _inputs: dict[str, Tensor] = field(default_factory=dict)  # by the first layer that gets them
    _outputs: dict[str, Tensor] = field(default_factory=dict)
    _first: dict[str, str] = field(default_factory=dict)  # layer -> the first one with the same input

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Add what the layers get while the block runs once, forward and backward."""
        seen: list[tuple[Tensor, str]] = []  # inputs, each with the first layer that got it
        layers = [
            (spec.module, self.block.get_submodule(spec.module.removeprefix(f"{self.path}."))) for spec in self.weights
        ]
        hooks = [layer.register_forward_hook(self._hook(name, seen)) for name, layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, module: str, seen: list[tuple[Tensor, str]]) -> Any:
        def see(layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            del layer
            self._add_input(module, arguments[0], seen)
            if output.requires_grad:
                output.register_hook(lambda gradient: _add(self._outputs, module, gradient))

        return see

    def _add_input(self, module: str, inputs: Tensor, seen: list[tuple[Tensor, str]]) -> None:
        first = next((name for tensor, name in seen if tensor is inputs), None)
        if first is None:
            seen.append((inputs, module))
            _add(self._inputs, module, inputs.detach())
        if self._first.setdefault(module, first or module) != (first or module):
            raise BadInput(
                f"{module} shares its input with {first or 'no layer'} in some texts and with {self._first[module]} in "
                "others; --exclude it, or leave --calibrate out"
            )

    def pool(self) -> None:
        """Add to the moments of each expert a share of the mean over its stack, since few tokens reach some experts."""
        stacks: dict[str, list[str]] = {}
        for spec in self.weights:
            if spec.stack:
                stacks.setdefault(spec.stack, []).append(spec.module)
        for modules in stacks.values():
            for sums in (self._inputs, self._outputs):  # an expert gets tensors of its own
                known = [module for module in modules if module in sums]
                if known:
                    share = LEAST_OF_MEAN * torch.stack([sums[name] for name in known]).sum(dim=0) / len(modules)
                    sums |= {name: sums[name] + share for name in known}

    def objective(self, spec: WeightSpec) -> Moments | Objective:
        """Return what the split of a weight minimizes; it is plain for a layer that got no token."""
        inputs_II = self._inputs.get(self._first.get(spec.module, ""))
        if inputs_II is None:
            return PLAIN
        return Moments(inputs_II, self._outputs.get(spec.module))


def _add(sums: dict[str, Tensor], name: str, rows: Tensor) -> None:
    """Add the sum of x x^T over the rows x of a tensor [..., N]."""
    rows_TN = rows.reshape(-1, rows.shape[-1]).float()
    if name not in sums:
        sums[name] = rows_TN.new_zeros(rows_TN.shape[1], rows_TN.shape[1])
    sums[name].addmm_(rows_TN.mT, rows_TN)
