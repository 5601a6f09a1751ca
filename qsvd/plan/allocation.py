"""Allocation: the codec and the rank of every weight, as a table that people can read and edit.

    # qsvd allocation
    # budget: 2.75bits
    weight                            codec         rank   bits    error
    model.layers.0.self_attn.q_proj   nf3-64-8x256    16   3.42   0.1311

Lines that begin with # are remarks. The first three columns count; the others are for the reader.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from qsvd.errors import BadInput, listing
from qsvd.numerics.codec import Codec
from qsvd.numerics.names import codec_named, spelling
from qsvd.numerics.nf4 import NormalFloat4
from qsvd.plan.weights import WeightSpec

TITLE = "# qsvd allocation"
EXPERT_RANK = 16  # of the components of an expert, unless another is asked for
LEVELS_BYTES, NESTED_LEVELS_BYTES = 64, 1024  # float32 tables that bitsandbytes stores with every weight
STATE_BYTES = 320  # most bytes of the JSON of one weight's quantization state
COLUMNS = ("weight", "codec", "rank", "bits", "error")


@dataclass(frozen=True)
class Choice:
    """The codec and the rank of one weight."""

    codec: Codec
    rank: int

    def num_bytes(self, shape: tuple[int, int], factor_bytes: int = 2) -> int:
        """Return the bytes stored for an [O, I] weight: the residual, and factors of `factor_bytes` per number."""
        return residual_bytes(self.codec, shape) + factor_bytes * self.rank * sum(shape)


@dataclass(frozen=True)
class Allocation:
    """A choice for every weight to split.

    Args:
        choices: By the path of the module, in model order.
        errors: Expected relative Frobenius error of each choice, by module; empty if nothing was measured.
        remarks: Lines on how it was found, for the head of the file.
    """

    choices: Mapping[str, Choice]
    errors: Mapping[str, float] = field(default_factory=dict)
    remarks: Sequence[str] = ()

    @cached_property
    def is_plain(self) -> bool:
        """Whether all residuals are bitsandbytes' NF4 of one kind, which loads without qsvd."""
        codecs = {choice.codec for choice in self.choices.values()}
        return len({codec.name for codec in codecs}) == 1 and all(isinstance(codec, NormalFloat4) for codec in codecs)


def residual_bytes(codec: Codec, shape: tuple[int, int]) -> int:
    """Return the bytes of an [O, I] residual in a file: for bitsandbytes' NF4, with tables and JSON, an upper bound."""
    if not isinstance(codec, NormalFloat4):
        return codec.num_bytes(shape)
    tables = LEVELS_BYTES + (NESTED_LEVELS_BYTES if codec.double_quant else 0)
    return codec.num_bytes(shape) + tables + STATE_BYTES


def uniform(weights: Sequence[WeightSpec], choice: Choice, expert_rank: int | None = None) -> Allocation:
    """Return the same choice for every weight; experts have their own rank, at most EXPERT_RANK by default."""
    rank = min(choice.rank, EXPERT_RANK) if expert_rank is None else expert_rank
    of_expert = Choice(choice.codec, rank)
    return Allocation({spec.module: of_expert if spec.stack else choice for spec in weights})


def stored_bytes(allocation: Allocation, weights: Sequence[WeightSpec], factor_bytes: int = 2) -> int:
    """Return the bytes of the codes, scales and factors of all weights."""
    return sum(allocation.choices[spec.module].num_bytes(spec.shape, factor_bytes) for spec in weights)


def residual_bits(allocation: Allocation, weights: Sequence[WeightSpec]) -> float:
    """Return the bits of the residuals per number of the weights, without factors, as LQ-LoRA counts."""
    sizes = (residual_bytes(allocation.choices[spec.module].codec, spec.shape) for spec in weights)
    return 8 * sum(sizes) / sum(math.prod(spec.shape) for spec in weights)


def to_text(allocation: Allocation, weights: Sequence[WeightSpec], factor_bytes: int = 2) -> str:
    """Write the table; the experts of a stack, which have one choice, have one line."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    firsts: dict[str, WeightSpec] = {}
    for spec in weights:
        firsts.setdefault(spec.group, spec)
    for group, spec in firsts.items():
        choice = allocation.choices[spec.module]
        bits = 8 * choice.num_bytes(spec.shape, factor_bytes) / math.prod(spec.shape)
        error = allocation.errors.get(spec.module)
        shown = "-" if error is None else f"{error:.4f}"
        rows.append((group, spelling(choice.codec), str(choice.rank), f"{bits:.3f}", shown))
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = [TITLE, *(f"# {remark}" for remark in allocation.remarks)]
    for row in rows:
        names = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join((*names, *numbers)))
    return "\n".join(lines) + "\n"


def from_text(text: str, weights: Sequence[WeightSpec], where: str) -> Allocation:
    """Read a table, which may have been edited.

    Args:
        weights: The weights to split; the table must name each of them once, and no others.
        where: The file, for error messages.

    Raises:
        BadInput: the text is not a table, or does not fit the model; the message lists all problems by line.
    """
    shapes = {spec.group: spec.shape for spec in weights}
    choices: dict[str, Choice] = {}
    named: set[str] = set()
    wrong: list[str] = []
    lines = [line.strip() for line in text.split("\n")]
    remarks = tuple(line.removeprefix("#").strip() for line in lines if line.startswith("#") and line != TITLE)
    for number, line in enumerate(lines, start=1):
        cells = line.split()
        if not cells or line.startswith("#") or tuple(cells[:3]) == COLUMNS[:3]:
            continue
        try:
            if cells[0] in named:
                raise BadInput(f"{cells[0]} has a line already")
            named.add(cells[0])
            choices[cells[0]] = _choice(cells, shapes)
        except BadInput as error:
            wrong.append(f"line {number}: {error}")
    missing = [module for module in shapes if module not in named]
    if missing:
        wrong.append(f"{len(missing)} weights have no line: {listing(missing)}")
    if not wrong:
        wrong = mixing_problems(choice.codec for choice in choices.values())
    if wrong:
        raise BadInput(f"{where} cannot be used: {listing(wrong, 3, separator='; ')}")
    return Allocation({spec.module: choices[spec.group] for spec in weights}, remarks=remarks)


def _choice(cells: Sequence[str], shapes: Mapping[str, tuple[int, int]]) -> Choice:
    """Read one line; BadInput says what is wrong with it."""
    if len(cells) < 3:
        raise BadInput("the line needs a weight, a codec and a rank")
    module, name, rank = cells[:3]
    if module not in shapes:
        raise BadInput(f"{module} is not a weight to split")
    most = min(shapes[module])
    if not rank.isdecimal() or int(rank) > most:
        raise BadInput(f"rank {rank} is outside 0..{most}, the ranks of {module} {list(shapes[module])}")
    return Choice(codec_named(name), int(rank))


def mixing_problems(codecs: Iterable[Codec]) -> list[str]:
    """Say which codecs cannot be in one model: bitsandbytes' NF4 has its own file layout, so that it must be alone."""
    names = {codec.name: isinstance(codec, NormalFloat4) for codec in codecs}
    alone = sorted(name for name, is_plain in names.items() if is_plain)
    if not alone or len(names) == 1:
        return []
    names_alone = " and ".join(alone)
    return [f"{names_alone} (bitsandbytes) cannot be mixed with other codecs; use one for all, or nf4-64-8x256 instead"]
