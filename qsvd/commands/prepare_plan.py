"""What `qsvd plan` counts, and against what: everything that can be refused before it counts."""

import math
from dataclasses import dataclass

import torch

from qsvd.checkpoint.host_memory import free_host_memory
from qsvd.commands.measure_speed import measured_flops, measured_link
from qsvd.commands.plan_source import PlanSource, plan_source
from qsvd.options import Plan
from qsvd.plan.activations import Batch
from qsvd.plan.duration import Rate, Speed
from qsvd.plan.memory import Limits
from qsvd.plan.placement import Wish
from qsvd.plan.sizes import parse_size
from qsvd.plan.split_model import SplitModelPlan
from qsvd.plan.training import Training

MOST_TOKENS = 2048  # of a sequence, unless more are asked for
FLOPS, LINK, DISK = 1e14, 25e9, 3e9  # assumed: operations and bytes a second, of a card on PCIe 4 and an NVMe disk


@dataclass(frozen=True)
class PlanJob:
    """A checked question.

    Args:
        source: The model.
        context: Tokens that the model can read, as far as its config says.
    """

    options: Plan
    source: PlanSource
    context: int
    training: Training
    limits: Limits
    wish: Wish
    speed: Speed

    @property
    def model(self) -> SplitModelPlan:
        return self.source.make(self.source.rank)


def prepare_plan(options: Plan) -> PlanJob:
    """Read the config, and refuse what cannot be planned.

    Raises:
        ValueError: an option is not usable, or the model is none that can be split.
    """
    _check_numbers(options)
    limits = _limits(options)
    source = plan_source(options)
    context = getattr(source.make(source.rank).text_config, "max_position_embeddings", None) or 2**20
    tokens = min(MOST_TOKENS, context) if options.tokens is None else options.tokens
    if tokens > context:
        raise ValueError(f"--tokens {tokens} is above the {context} positions of the model")
    batch = Batch(
        tokens=tokens,
        batch=options.batch,
        is_masked=options.batch > 1,
        checkpointing=options.gradient_checkpointing,
        device="cuda",
    )
    optimizer = "paged_adamw_8bit" if options.optimizer == "auto" else options.optimizer
    return PlanJob(
        options=options,
        source=source,
        context=context,
        training=Training(batch, options.accumulate, optimizer, options.layer_major),
        limits=limits,
        wish=Wish(options.resident),
        speed=_speed(options),
    )


def _speed(options: Plan) -> Speed:
    """As given, or as the card here does, or as a common one does."""
    has_gpu = torch.cuda.is_available()
    flops = Rate(measured_flops(), "measured") if has_gpu and options.tflops is None else Rate(FLOPS)
    link = Rate(measured_link(), "measured") if has_gpu and options.link is None else Rate(LINK)
    return Speed(
        flops if options.tflops is None else Rate(1e12 * options.tflops, "given"),
        link if options.link is None else Rate(1e9 * options.link, "given"),
        Rate(DISK) if options.disk is None else Rate(1e9 * options.disk, "given"),
    )


def _limits(options: Plan) -> Limits:
    """As given, or what is here."""
    has_gpu = torch.cuda.is_available()
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory if has_gpu else None
    host = free_host_memory() if has_gpu else None
    return Limits(
        gpu=gpu if options.gpu is None else parse_size(options.gpu, "--gpu"),
        host=host if options.host is None else parse_size(options.host, "--host"),
    )


def _check_numbers(options: Plan) -> None:
    """Every number that is out of its range, in one sentence."""
    least = {
        "tokens": (options.tokens, 2),
        "batch": (options.batch, 1),
        "accumulate": (options.accumulate, 1),
        "rank": (options.rank, 0),
    }
    wrong = [
        f"--{name} {value} is below {low}" for name, (value, low) in least.items() if value is not None and value < low
    ]
    above = {"tflops": options.tflops, "link": options.link, "disk": options.disk}
    wrong += [
        f"--{name} {value:g} is no number above 0"
        for name, value in above.items()
        if value is not None and not 0 < value < math.inf
    ]
    if options.resident != "auto" and not 0 <= options.resident <= 1:
        wrong.append(f"--resident {options.resident:g} is neither auto nor a share from 0 to 1")
    if options.layer_major and not options.gradient_checkpointing:
        wrong.append("--layer-major computes each batch of a block again: leave --no-gradient-checkpointing out")
    if wrong:
        raise ValueError("; ".join(wrong))
