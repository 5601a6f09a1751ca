"""The ways to train on several GPUs: bytes of each GPU, and the estimated time of a step.

N processes divide the batches of a step. Adapters, optimizer state, activations and embeddings are whole in each one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from qsvd.memory.duration import GPU, Rate, Speed, StepTime, step_time
from qsvd.memory.items import Limits, Placement
from qsvd.memory.placement import Placed, Wish, place
from qsvd.memory.split_model import SplitModelPlan
from qsvd.memory.training import Training
from qsvd.plan.tensors import total_bytes

Way = Literal["whole", "sharded", "sharded, offloaded", "offloaded"]
INTERCONNECTS: Mapping[str, Rate] = {  # bytes that a GPU receives from the others in a second, all assumed
    "nvlink": Rate(360e9),  # 80 % of the 450 GB/s that NVLink 4 of an H100 has in each direction
    "pcie": Rate(GPU.link.value / 2),  # through CPU memory, in and out: gaming GPUs have no direct way
}


@dataclass(frozen=True)
class Group:
    """Equal GPUs of one machine, which share its disk.

    Args:
        speed: Of one GPU, with its own link to CPU memory.
        interconnect: Bytes a second that one GPU receives from the others.
    """

    gpus: int
    speed: Speed
    interconnect: Rate


@dataclass(frozen=True)
class GroupStep:
    """Estimated seconds of one training step of several GPUs.

    Args:
        one: What each GPU computes and copies from its CPU.
        gather: Seconds to get the shards of the residuals from the other GPUs, while it computes.
        reduce: Seconds to add up the gradients of the adapters, after that.
        gpus: Number of GPUs.
    """

    one: StepTime
    gather: float
    reduce: float
    gpus: int

    @property
    def seconds(self) -> float:
        return max(self.one.seconds, self.gather) + self.reduce

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all GPUs together."""
        return self.gpus * self.one.tokens / self.seconds


@dataclass(frozen=True)
class Strategy:
    """One way to train on several GPUs.

    Args:
        way: "whole": every GPU holds all residuals; "sharded": each holds its part of every block, maybe in CPU memory,
            and gathers blocks when needed; "offloaded": each holds some blocks, the others in CPU memory or on disk.
        placed: What one process holds, against the memory of one GPU and its part of the CPU memory.
    """

    way: Way
    placed: Placed
    step: GroupStep

    @property
    def fits(self) -> bool:
        return self.placed.memory.fits

    @property
    def host(self) -> int:
        """Bytes of CPU memory of all processes."""
        return self.step.gpus * self.placed.memory.total("host")


def strategies(
    model: SplitModelPlan, training: Training, limits: Limits, wish: Wish, group: Group
) -> tuple[Strategy, ...]:
    """Return the ways to train, the simplest first: no offloading that changes nothing, no sharding if layer-major.

    Args:
        training: The batches of one GPU: its part of a step.
        limits: Bytes of one GPU, and of the CPU memory of the machine, which the processes divide.
    """
    own = replace(limits, host=None if limits.host is None else limits.host // group.gpus)
    found: dict[Way, Placed] = {"whole": place(model, training, own, replace(wish, share=1.0))}
    divided = replace(wish, share="auto", shards=group.gpus)
    if not training.layer_major:
        found["sharded"] = place(model, training, own, divided)
        if not found["sharded"].memory.fits:
            found["sharded, offloaded"] = place(model, training, own, replace(divided, offloads_parts=True))
    less = place(model, training, own, wish)
    if less.placement.resident != len(model.blocks):
        found["offloaded"] = less
    return tuple(
        Strategy(way, placed, group_step(model, training, placed.placement, group)) for way, placed in found.items()
    )


def best_of(found: tuple[Strategy, ...]) -> Strategy | None:
    """Return the fastest strategy of those that fit, of equal ones the first; None if none fits."""
    return max((one for one in found if one.fits), key=lambda one: one.step.tokens_per_second, default=None)


def group_step(model: SplitModelPlan, training: Training, placement: Placement, group: Group) -> GroupStep:
    """Estimate one training step of several GPUs: that of one of them, and what they send each other.

    A GPU receives (N - 1) / N of every sharded residual twice for each batch, for the forward and the backward pass.
    The sum of the gradients moves 2 (N - 1) / N of their bytes.
    """
    part = (group.gpus - 1) / group.gpus / group.interconnect.value
    packed = sum(block.page for block in model.blocks) if placement.shards else 0
    speed = replace(group.speed, disk=replace(group.speed.disk, value=group.speed.disk.value / group.gpus))  # one disk
    one = step_time(model, training, placement, speed)
    return GroupStep(one, 2 * training.accumulate * packed * part, 2 * total_bytes(model.parameters) * part, group.gpus)
