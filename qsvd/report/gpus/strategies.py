"""The ways to train on several GPUs as a table, a first line and JSON, and the command that starts the best one."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from rich.table import Table

from qsvd.errors import show_size
from qsvd.memory.gpus.strategies import Group, Strategy, best_of
from qsvd.memory.training import Training
from qsvd.options import Train
from qsvd.report.next_commands import train_command

WORDS = {
    "whole": "every GPU holds the whole model",
    "sharded": "the residual is sharded over the GPUs (--shard yes)",
    "sharded, offloaded": "the residual is sharded, its parts in CPU memory (--shard offload)",
    "offloaded": "every GPU offloads blocks",
}
SHARD: Mapping[str, Literal["yes", "offload"]] = {"sharded": "yes", "sharded, offloaded": "offload"}
MEMORY = {"gpu": "GPU memory", "host": "CPU memory", "disk": "disk space"}


@dataclass(frozen=True)
class GpusAnswer:
    """Training on several GPUs.

    Args:
        training: The part of each GPU.
    """

    strategies: tuple[Strategy, ...]
    group: Group
    training: Training

    @property
    def best(self) -> Strategy | None:
        """The fastest strategy that fits."""
        return best_of(self.strategies)


def gpus_headline(answer: GpusAnswer) -> str:
    """Return the first line: which strategy is best."""
    best, count = answer.best, answer.group.gpus
    if best is None:
        return f"Does not fit {count} GPUs in any way"
    used, limit = best.placed.memory.total("gpu"), best.placed.memory.limits.gpu
    room = show_size(used) if limit is None else f"{used / 1e9:.1f} of {limit / 1e9:.1f} GB"
    first = f"Best on {count} GPUs: {WORDS[best.way]}, {best.step.tokens_per_second:,.0f} tokens per second"
    return f"{first}, {room} on each GPU" + ("; no limit is known: give --gpu and --host" if limit is None else "")


def gpus_table(answer: GpusAnswer) -> Table:
    """Return a row for each strategy."""
    table = Table(title=f"qsvd train on {answer.group.gpus} GPUs", title_justify="left", title_style="bold")
    table.add_column("strategy")
    for head in ("each GPU (GB)", "CPU memory (GB)", "fits", "s per step", "tokens/s of all"):
        table.add_column(head, justify="right")
    for one in answer.strategies:
        memory = one.placed.memory
        fits = "yes" if one.fits else f"too little {' and '.join(MEMORY[where] for where in memory.lacking)}"
        table.add_row(
            one.way,
            f"{memory.total('gpu') / 1e9:,.2f}",
            f"{one.host / 1e9:,.2f}",
            fits,
            f"{one.step.seconds:.3g}",
            f"{one.step.tokens_per_second:,.0f}",
        )
    return table


def gpus_lines(answer: GpusAnswer, blocks: int) -> list[str]:
    """Return where the time of each strategy goes, and what is assumed."""
    lines = []
    for one in answer.strategies:
        step, resident = one.step, one.placed.placement.resident
        parts = [f"computing {step.one.compute + step.one.decode:.2g} s"]
        if resident is not None and resident < blocks:
            where = "CPU memory" if one.placed.placement.pages == "host" else "disk"
            parts.append(f"copying {blocks - resident} of {blocks} blocks from {where} {step.one.transfer:.2g} s")
        if one.placed.placement.activation_offload:
            parts.append("activation checkpoints in CPU memory")
        if step.gather:
            parts.append(f"gathering blocks {step.gather:.2g} s")
        lines.append(f"{one.way}: {WORDS[one.way]}; {', '.join(parts)}, then adding up gradients {step.reduce:.2g} s")
    rate, batch = answer.group.interconnect, answer.training.batch
    return [
        *lines,
        f"each GPU computes {answer.training.accumulate} x {batch.batch} sequences a step; blocks are copied and "
        f"gathered while it computes; it receives {rate.value / 1e9:.4g} GB/s from the others ({rate.source})",
    ]


def gpus_json(answer: GpusAnswer) -> dict[str, Any]:
    """Return bytes, times and verdict of each strategy."""
    rows = [
        {
            "strategy": one.way,
            "gpu_bytes": one.placed.memory.total("gpu"),
            "host_bytes": one.host,
            "fits": one.fits,
            "lacking": list(one.placed.memory.lacking),
            "limits": asdict(one.placed.memory.limits),
            "placement": asdict(one.placed.placement),
            "compute": one.step.one.compute + one.step.one.decode,
            "copy": one.step.one.transfer,
            "gather": one.step.gather,
            "reduce": one.step.reduce,
            "seconds": one.step.seconds,
            "tokens_per_second": one.step.tokens_per_second,
        }
        for one in answer.strategies
    ]
    best = answer.best
    found = {"count": answer.group.gpus, "interconnect": asdict(answer.group.interconnect), "strategies": rows}
    return found | {"best": None if best is None else best.way}


def gpus_lacking(strategies: Sequence[Strategy]) -> str:
    """Return a sentence on what the strategies lack, where none fits."""
    parts = []
    for one in strategies:
        memory = one.placed.memory
        missing = (f"{show_size(-(memory.spare(where) or 0))} more {MEMORY[where]}" for where in memory.lacking)
        parts.append(f"{one.way}: {' and '.join(missing)}")
    return f"each process of qsvd train needs, {'; '.join(parts)}"


def torchrun_command(options: Train, answer: GpusAnswer, best: Strategy) -> str:
    """Return the command that starts the best strategy; CPU memory is divided by the processes themselves."""
    batch, times = answer.training.batch.batch, answer.training.accumulate * answer.group.gpus
    run = replace(
        options, batch_size=batch, accumulate=times, step_tokens=None, host=None, shard=SHARD.get(best.way, "no")
    )
    command, mark, comment = train_command(run).partition("  #")
    return f"torchrun --nproc-per-node {answer.group.gpus} -m {command}{mark}{comment}"
