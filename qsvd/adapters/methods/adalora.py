"""AdaLoRA: triplets of a trained singular value decomposition, of which the least important are set to zero.

Shape suffixes as in adapter.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from qsvd.adapters.adapter import AdapterOptions, Defaults, StoredWeight
from qsvd.adapters.methods.added import Added, joined
from qsvd.adapters.methods.hooks import Course, Hooks
from qsvd.adapters.methods.orthonormal import add_gradient
from qsvd.errors import BadInput
from qsvd.option_types import FROM_ZERO, SHARE, Help, at_least
from qsvd.plan.tensors import AdapterTensors, TensorShape

DEVIATION = 0.02  # of the first A and B


@dataclass(frozen=True, kw_only=True)
class AdaLoraOptions:
    """The options of AdaLoRA's own."""

    target_rank: Annotated[int | None, at_least(1), Help("Average rank at the end. Default: two thirds of --rank.")] = (
        None
    )
    tinit: Annotated[float, SHARE, Help("Share of the steps before the first triplet is removed.")] = 0.1
    tfinal: Annotated[float, SHARE, Help("Share of the steps after the last one is removed.")] = 0.3
    delta_t: Annotated[int, at_least(1), Help("Steps between two removals.")] = 10
    beta1: Annotated[float, SHARE, Help("Memory of the importance.")] = 0.85
    beta2: Annotated[float, SHARE, Help("Memory of its uncertainty.")] = 0.85
    orthonormal_weight: Annotated[float, FROM_ZERO, Help("Weight of the orthonormality loss.")] = 0.1


def budget(step: int, first: int, target: int, course: tuple[int, int, int]) -> int:
    """Return how many triplets the model has after a step (equation 12, rounded down, as in the authors' code).

    Args:
        first, target: Triplets at the start and at the end.
        course: The last step before the first removal, how many steps follow the last removal, and all steps.
    """
    start, rest, steps = course
    if step <= start:
        return first
    if step > steps - rest:
        return target
    left = 1 - (step - start) / (steps - rest - start)
    return int(target + (first - target) * left**3)


class Allocate(Hooks):
    """Scores the triplets of all layers after every step, and sets those with the lowest scores to zero.

    The score is the paper's equations 8 to 11. A triplet's is that of its value plus the means of its vectors'.

    Args:
        adapters: Have `chosen`, their options; `target_rank`, of each; `diagonal`, the values of the triplets;
            `scored`, the parameters whose rows (0) or columns (1) are the vectors of the triplets; and `orthonormal`,
            those whose rows (0) or columns (1) are kept near orthonormal.
    """

    def __init__(self, adapters: Mapping[str, Any], course: Course):
        super().__init__(adapters, course)
        one = next(iter(adapters.values()))
        own, self.scored, self.orthonormal = one.chosen, one.scored, one.orthonormal
        self.every = own.delta_t
        self.betas = (own.beta1, own.beta2)
        self.course_of_ranks = (int(own.tinit * course.steps), int(own.tfinal * course.steps), course.steps)
        self.first = sum(len(adapter.diagonal) for adapter in adapters.values())
        self.target = sum(adapter.target_rank for adapter in adapters.values())
        self.weight = own.orthonormal_weight / (len(self.orthonormal) * len(adapters))
        self.moments = {
            f"{path} {part} {kind}": torch.zeros_like(adapter.get_parameter(part), dtype=torch.float32)
            for path, adapter in adapters.items()
            for part in ("diagonal", *self.scored)
            for kind in ("importance", "uncertainty")
        }

    def after_backward(self, step: int) -> None:
        del step
        for adapter in self.adapters.values():
            for part, side in self.orthonormal.items():
                add_gradient(adapter.get_parameter(part), self.weight, columns=side == 1)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        _, rest, steps = self.course_of_ranks
        if step > steps - rest:  # the ranks are chosen: values that were removed have moved again
            for path, adapter in self.adapters.items():
                adapter.diagonal.mul_(self.moments[f"{path} kept"])
            return
        self._measure()
        is_last = step == steps - rest
        wanted = self.target if is_last else budget(step, self.first, self.target, self.course_of_ranks)
        if (step > self.course_of_ranks[0] and step % self.every == 0) or is_last:
            self._remove(self.first - wanted)
        if is_last:
            kept = {f"{path} kept": (adapter.diagonal != 0).float() for path, adapter in self.adapters.items()}
            self.moments = kept

    def _measure(self) -> None:
        first, second = self.betas
        for path, adapter in self.adapters.items():
            for part in ("diagonal", *self.scored):
                parameter = adapter.get_parameter(part)
                if parameter.grad is None:  # of an expert without tokens
                    continue
                now = (parameter.float() * parameter.grad.float()).abs_()
                importance = self.moments[f"{path} {part} importance"].mul_(first).add_(now, alpha=1 - first)
                now.sub_(importance).abs_()
                self.moments[f"{path} {part} uncertainty"].mul_(second).add_(now, alpha=1 - second)

    def _remove(self, count: int) -> None:
        if count <= 0:
            return
        scores = {path: self._scores(path) for path in self.adapters}
        limit = torch.cat([*scores.values()]).kthvalue(count).values
        for path, adapter in self.adapters.items():
            adapter.diagonal.masked_fill_(scores[path] <= limit, 0)

    def _scores(self, path: str) -> Tensor:
        found = {
            part: self.moments[f"{path} {part} importance"] * self.moments[f"{path} {part} uncertainty"]
            for part in ("diagonal", *self.scored)
        }
        scores_K = found["diagonal"]
        for part, side in self.scored.items():
            scores_K = scores_K + found[part].mean(dim=1 - side)
        return scores_K

    def state(self) -> dict[str, Tensor]:
        return self.moments

    def restore(self, state: Mapping[str, Tensor]) -> None:
        device = next(iter(self.adapters.values())).diagonal.device
        self.moments = {name: tensor.to(device) for name, tensor in state.items()}


def target_rank(chosen: AdaLoraOptions, whole: int, rank: int) -> int:
    """Return the average rank at the end.

    Args:
        whole, rank: The rank that was given, and what a weight has of it at the start.
    """
    wanted = chosen.target_rank
    if wanted is not None and wanted > whole:
        raise BadInput(f"target_rank {wanted} is above the rank {whole}, which it is reached from")
    return min(rank, max(1, 2 * whole // 3) if wanted is None else wanted)


def moments_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorShape]:
    """Return the shapes of what `Allocate` keeps of parameters with these shapes."""
    return {
        f"{part} {kind}": TensorShape(size, torch.float32)
        for part, size in shapes.items()
        for kind in ("importance", "uncertainty")
    }


class AdaLora(Added):
    """AdaLoRA (arXiv:2303.10512): W' = Q + B0 A0 + (alpha / K) B diag(E) A; B, E and A are trained, from E = 0.

    The budget of triplets falls from K a layer to an average of --target-rank. The divisor stays K when triplets are
    removed, as in the authors' code. Parameters: K (O + I + 1) at the start; removed triplets leave the export.
    """

    paper = "2303.10512"
    starts_as = "zero, added"
    defaults = Defaults(
        rank=12, scale=16 / 12, learning_rate=5e-4, reason="the authors' alpha and rate for DeBERTaV3 on MNLI"
    )
    options = AdaLoraOptions
    hooks = Allocate
    scored: ClassVar[Mapping[str, int]] = MappingProxyType({"down": 0, "up": 1})
    orthonormal = scored

    def __init__(self, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator):
        rank, scale = self.size(stored, options)
        super().__init__(stored, scale=scale)
        self.chosen = self.own(options)
        self.target_rank = target_rank(self.chosen, self.defaults.rank_of(options, stored.rank), rank)
        (rows, columns), device, dtype = stored.residual.shape, stored.up_OR.device, options.torch_dtype
        down_KI = torch.empty(rank, columns).normal_(0, DEVIATION, generator=generator)
        up_OK = torch.empty(rows, rank).normal_(0, DEVIATION, generator=generator)
        self.up, self.down = (nn.Parameter(factor.to(device, dtype)) for factor in (up_OK, down_KI))
        self.diagonal = nn.Parameter(torch.zeros(rank, dtype=dtype, device=device))

    @classmethod
    def start(cls, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator) -> "AdaLora":
        return cls(stored, options, generator)

    @classmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        rank = min(rank, *shape)
        shapes = {"up": (shape[0], rank), "down": (rank, shape[1]), "diagonal": (rank,)}
        parameters = {part: TensorShape(size, dtype) for part, size in shapes.items()}
        found = joined(shape, stored_rank, parameters, rank, (dtype, stored_dtype))
        made = {**found.made, "scaled": TensorShape((rank,), dtype)}
        return AdapterTensors(parameters, found.buffers, made, state=moments_of(shapes))

    def added(self) -> tuple[Tensor, Tensor]:
        return self.up * (self.scale * self.diagonal), self.down

    def exported(self) -> tuple[Tensor, Tensor]:
        up_OK, down_KI = self.factors()
        kept = torch.cat((torch.ones(self.get_buffer("frozen_up").shape[1], dtype=torch.bool), self.diagonal != 0))
        return up_OK[:, kept], down_KI[kept]


METHOD = AdaLora
