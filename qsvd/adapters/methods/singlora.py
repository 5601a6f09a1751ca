"""SingLoRA: one trained matrix times its transpose, which counts more from step to step. Suffixes as in adapter.py."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from qsvd.adapters.adapter import AdapterOptions, Defaults, StoredWeight
from qsvd.adapters.methods.hooks import Course, Hooks
from qsvd.adapters.methods.mirrored import Mirrored
from qsvd.option_types import Help, at_least
from qsvd.plan.tensors import AdapterTensors, TensorShape

SHARE = 10  # of a run's steps one in so many, until the product counts in full


@dataclass(frozen=True, kw_only=True)
class SingLoraOptions:
    """The options of SingLoRA's own."""

    ramp_steps: Annotated[
        int | None,
        at_least(1),
        Help("Optimizer steps until the product counts in full. Default: a tenth of the run."),
    ] = None


class _Ramp(Hooks):
    """Raises u after every optimizer step, to min(u at the start + step / T, 1)."""

    def __init__(self, adapters: Mapping[str, "SingLora"], course: Course):
        super().__init__(adapters, course)
        self.steps = next(iter(adapters.values())).ramp_steps or max(1, course.steps // SHARE)
        # above 0 in a run that goes on from another run's adapter
        self.starts = {path: adapter.get_buffer("ramp").clone() for path, adapter in adapters.items()}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        for path, adapter in self.adapters.items():
            adapter.ramp.copy_((self.starts[path] + step / self.steps).clamp_(max=1))

    def state(self) -> dict[str, Tensor]:
        return self.starts

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.starts = {path: state[path].to(start.device) for path, start in self.starts.items()}


class SingLora(Mirrored):
    """SingLoRA (arXiv:2507.05566): W' = Q + B0 A0 + (alpha / K) u A A*^T, with A [max(O, I), K] trained.

    A* has the first rows of A, as many as the smaller side; A A*^T is transposed where I > O. `down` is A^T. A starts
    random, and u = min(t / T, 1) rises from 0 with the optimizer steps t. Only `qsvd train` moves it: other trainers
    call no hooks and would train nothing. u is saved as `ramp`, and an export has it as it is. In a square weight A A^T
    has no negative eigenvalue: it can only add. Parameters: K max(O, I).
    """

    paper = "2507.05566"
    starts_as = "zero, added"
    defaults = Defaults(
        rank=8,
        scale=1.0,
        learning_rate=1e-3,
        reason="rank, alpha and rate of a third-party port, which cites the paper for the rate; not measured",
    )
    options = SingLoraOptions
    hooks = _Ramp
    ramp: Tensor

    def __init__(self, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator):
        super().__init__(stored, options, generator)
        self.ramp_steps = self.own(options).ramp_steps
        self.register_buffer("ramp", torch.zeros((), device=stored.up_OR.device))

    @classmethod
    def start(cls, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator) -> "SingLora":
        return cls(stored, options, generator)

    @classmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        found = super().tensors(shape, stored_rank, rank, dtype, stored_dtype)
        ramp = TensorShape((), torch.float32)
        return replace(found, buffers={**found.buffers, "ramp": ramp}, state={"start": ramp})

    def added(self) -> tuple[Tensor, Tensor]:
        return self.scaled(self.scale * self.ramp)


METHOD = SingLora
