"""Trained parameters and bytes of a row, counted from config.json alone, and the rank that a budget allows.

Bytes are those of the files that a trained model needs, in 16 bits: codes and scales, everything that is not quantized,
the stored components, and 2 bytes for every trained parameter. A method that trains the stored components replaces
them, so they are not counted twice. A new classification head is the same for all rows, and not counted.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from qsvd.adapters.adapter import Adapter
from qsvd.adapters.methods.table import METHODS
from qsvd.adapters.start import planned
from qsvd.errors import BadInput, parse_size
from qsvd.files.source import download_config, read_config
from qsvd.memory.split_model import Skeleton, SplitModelPlan, skeleton
from qsvd.numerics.search import most
from qsvd.options import Compare
from qsvd.plan.allocation import Allocation, Choice, Table, tables_of, uniform, usual_codec
from qsvd.plan.budget import assumed
from qsvd.plan.weights import ModelPlan, plan_model
from qsvd.prepare.allocate import read_table
from qsvd.prepare.comparing.rows import MethodSpec, SplitSpec
from qsvd.prepare.train import adapter_options_of, check_pairs

RANK = 16  # where --size is not given
ELEMENT = 2  # bytes of a number in 16 bits
COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kM]?)")
THOUSANDS = {"": 1, "k": 10**3, "M": 10**6}


@dataclass(frozen=True)
class Size:
    """A row at one rank.

    Args:
        rank: Of the method; None trains the components as they are stored.
        stored_rank: Of the split; None where its options set the ranks of all layers.
        parameters: Trained ones, without a new classification head.
        num_bytes: Of the trained model.
    """

    rank: int | None
    stored_rank: int | None
    parameters: int
    num_bytes: int


class Sizes:
    """Counts the rows of a model.

    Args:
        model: Folder or Hub id of the 16-bit model; only its config is read.

    Raises:
        BadInput: the config cannot be used.
    """

    def __init__(self, model: str):
        folder = Path(model).expanduser()
        config = read_config(folder if folder.exists() else download_config(model))
        if getattr(config, "quantization_config", None) is not None:
            raise BadInput(f"{model} is quantized already; give its 16-bit model, and --splits for how to quantize it")
        self._config = config
        self._skeleton: Skeleton = skeleton(config, torch.bfloat16)
        self._plans: dict[str, ModelPlan] = {}
        self.architecture = plan_model(config).architecture

    @property
    def elements(self) -> int:
        """How many numbers the layers that can be quantized have."""
        return sum(rows * columns for rows, columns in (spec.shape for spec in plan_model(self._config).weights))

    def most_rank(self, split: SplitSpec) -> int:
        """Return the shorter side of the smallest layer."""
        return min(min(spec.shape) for spec in self._names(split).weights)

    def size(self, split: SplitSpec, method: MethodSpec, rank: int) -> Size:
        """Return a row at a rank; a method that trains the components as they are stored has that of the split.

        Raises:
            BadInput: the method cannot start at this rank.
        """
        check_pairs(method.options, method.method)
        if split.is_mixed:
            return self._counted(split, method, rank, None)
        if split.has_rank:
            return self._counted(split, method, rank, split.options.rank)
        if METHODS[method.method].needs_components:
            return self._counted(split, method, rank, rank)
        try:
            return self._counted(split, method, rank, 0)
        except BadInput as error:
            with suppress(BadInput):
                return self._counted(split, method, rank, rank)  # as cora, which takes its bases from components
            raise error

    def _counted(self, split: SplitSpec, method: MethodSpec, rank: int, stored: int | None) -> Size:
        kind = METHODS[method.method]
        options = replace(adapter_options_of(method.options), rank=rank if kind.takes_rank else None)
        names = self._names(split)
        tables = tables_of(names, split.options.head_bits, split.options.embedding_bits)
        plan = planned(self._skeleton, names, self._allocation(split, stored, tables), options=options)
        plan = replace(plan, tables=tables)
        parameters = sum(tensor.numel for tensor in plan.parameters)
        if not parameters:
            raise BadInput(f"{method.method} trains no layer of this model")
        return Size(options.rank, stored, parameters, _bytes(plan, parameters, kind))

    def _names(self, split: SplitSpec) -> ModelPlan:
        if split.text not in self._plans:
            options = split.options
            self._plans[split.text] = plan_model(
                self._config,
                include=options.include,
                exclude=options.exclude,
                include_towers=options.include_towers,
            )
        return self._plans[split.text]

    def _allocation(self, split: SplitSpec, rank: int | None, tables: Sequence[Table]) -> Allocation:
        options, weights = split.options, self._names(split).weights
        if options.allocation is not None:
            return read_table(options.allocation, weights, tables)[0]
        if options.budget is not None:
            return assumed(weights, options.budget, options.rank)
        codec = usual_codec(weights, double_quant=options.double_quant, packed=bool(tables), name=options.codec)
        return uniform(weights, Choice(codec, rank or 0), options.expert_rank)


def _bytes(plan: SplitModelPlan, parameters: int, kind: type[Adapter]) -> int:
    choices = plan.allocation.choices  # tables of levels, which all weights share, are not counted
    residual = sum(choices[spec.module].codec.num_bytes(spec.shape) for spec in plan.names.weights)
    rest = plan.dense.total - plan.skeleton.buffers
    is_replaced = kind.needs_components and kind.component_use == Adapter.component_use and not kind.takes_rank
    stored = sum(choices[spec.module].rank * sum(spec.shape) for spec in plan.names.weights)
    return residual + rest + ELEMENT * (parameters + (0 if is_replaced else stored))


def measure(equal: str, size: Size) -> int:
    """Return what a comparison limits: parameters or bytes."""
    return size.parameters if equal == "parameters" else size.num_bytes


def limit_of(options: Compare, first: Callable[[], Size]) -> int:
    """Return --size as a number.

    Args:
        first: Returns the first row at rank 16, whose parameters or bytes are the default.

    Raises:
        BadInput: the size is not of the kind that --equal names.
    """
    text = "" if options.size is None else str(options.size).strip()
    if not text:
        return RANK if options.equal == "rank" else measure(options.equal, first())
    if options.equal == "bytes":
        return parse_size(text, "--size")
    found = COUNT.fullmatch(text.replace(",", ""))
    count = round(float(found[1]) * THOUSANDS[found[2]]) if found else 0
    if options.equal == "rank" and not (text.isdigit() and count):
        raise BadInput(f"--size {text} is not a rank: give a whole number of at least 1")
    if not count:
        raise BadInput(f"--size {text} is not a number of parameters: give one such as 300000, 300k or 1.5M")
    return count


def best_within(count: Callable[[int], int], limit: int, most_rank: int) -> int | None:
    """Return the rank whose count is the largest that is not above a limit; the lowest one of equals.

    Args:
        count: Of a rank; a BadInput where a method cannot have it.
        limit: Of the count.
        most_rank: The highest rank.
    """

    @cache
    def known(rank: int) -> int | None:
        with suppress(BadInput):
            return count(rank)
        return None

    places = sorted({min(2**power, most_rank) for power in range(most_rank.bit_length() + 1)})
    values = [known(rank) for rank in places]
    is_rising = None not in values and values == sorted({*values})  # pyright: ignore[reportArgumentType]
    if is_rising:
        return most(1, most_rank, lambda rank: (known(rank) or 0) <= limit)
    able = {rank: found for rank in range(1, most_rank + 1) if (found := known(rank)) is not None and found <= limit}
    return max(able, key=lambda rank: (able[rank], -rank), default=None)
