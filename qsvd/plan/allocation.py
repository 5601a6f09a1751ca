"""Allocation: which codec and which rank every weight gets, as a table that a person can read and edit.

    # qsvd allocation
    # budget: 2.75bits
    weight                            codec         rank   bits    error
    model.layers.0.self_attn.q_proj   nf3-64-8x256    16   3.42   0.1311

Lines that begin with # are remarks. Of the columns the first three count; the others are for the reader.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from qsvd.errors import BadInput, listing
from qsvd.numerics.codec import Codec
from qsvd.numerics.names import codec_named, spelling
from qsvd.numerics.nf4 import NormalFloat4
from qsvd.plan.weights import WeightSpec

TITLE = "# qsvd allocation"
LEVELS_BYTES, NESTED_LEVELS_BYTES = 64, 1024  # float32 tables that bitsandbytes keeps with every weight
STATE_BYTES = 320  # at most, for the JSON of one weight's quantization state
COLUMNS = ("weight", "codec", "rank", "bits", "error")


@dataclass(frozen=True)
class Choice:
    """What one weight gets."""

    codec: Codec
    rank: int

    def num_bytes(self, shape: tuple[int, int], factor_bytes: int = 2) -> int:
        """All that is stored for an [O, I] weight: the residual, and factors of `factor_bytes` a number."""
        return residual_bytes(self.codec, shape) + factor_bytes * self.rank * sum(shape)


@dataclass(frozen=True)
class Allocation:
    """A choice for every weight that is split.

    Args:
        choices: By the path of the module, in model order.
        errors: Relative Frobenius error that was expected of the choice, by module; empty where nothing was measured.
        remarks: How it was found, a line each; written at the head of the file.
    """

    choices: Mapping[str, Choice]
    errors: Mapping[str, float] = field(default_factory=dict)
    remarks: Sequence[str] = ()

    @cached_property
    def is_plain(self) -> bool:
        """Whether all residuals are bitsandbytes' NF4 of one kind, which loads without qsvd."""
        codecs = {choice.codec for choice in self.choices.values()}
        return len({spelling(codec) for codec in codecs}) == 1 and all(isinstance(c, NormalFloat4) for c in codecs)


def residual_bytes(codec: Codec, shape: tuple[int, int]) -> int:
    """Bytes of an [O, I] residual in a file; of bitsandbytes', whose files also hold tables and JSON, the most."""
    if not isinstance(codec, NormalFloat4):
        return codec.num_bytes(shape)
    tables = LEVELS_BYTES + (NESTED_LEVELS_BYTES if codec.double_quant else 0)
    return codec.num_bytes(shape) + tables + STATE_BYTES


def uniform(weights: Sequence[WeightSpec], choice: Choice) -> Allocation:
    """The same for every weight."""
    return Allocation({spec.module: choice for spec in weights})


def stored_bytes(allocation: Allocation, weights: Sequence[WeightSpec], factor_bytes: int = 2) -> int:
    """Codes, scales and factors of all weights."""
    return sum(allocation.choices[spec.module].num_bytes(spec.shape, factor_bytes) for spec in weights)


def residual_bits(allocation: Allocation, weights: Sequence[WeightSpec]) -> float:
    """Bits that the residuals take for each number of the weights, without factors, as LQ-LoRA counts."""
    sizes = (residual_bytes(allocation.choices[spec.module].codec, spec.shape) for spec in weights)
    return 8 * sum(sizes) / sum(math.prod(spec.shape) for spec in weights)


def to_text(allocation: Allocation, weights: Sequence[WeightSpec], factor_bytes: int = 2) -> str:
    """The table."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    for spec in weights:
        choice = allocation.choices[spec.module]
        bits = 8 * choice.num_bytes(spec.shape, factor_bytes) / math.prod(spec.shape)
        error = allocation.errors.get(spec.module)
        shown = "-" if error is None else f"{error:.4f}"
        rows.append((spec.module, spelling(choice.codec), str(choice.rank), f"{bits:.3f}", shown))
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = [TITLE, *(f"# {remark}" for remark in allocation.remarks)]
    for row in rows:
        names = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join((*names, *numbers)))
    return "\n".join(lines) + "\n"


def from_text(text: str, weights: Sequence[WeightSpec], where: str) -> Allocation:
    """The allocation of a table, perhaps an edited one.

    Args:
        weights: That are to be split; the table has to name each of them once, and no others.
        where: The file, for the sentence of an error.

    Raises:
        BadInput: the table is none, or does not fit the model; everything that is wrong with it, by line.
    """
    shapes = {spec.module: spec.shape for spec in weights}
    choices: dict[str, Choice] = {}
    named: set[str] = set()
    wrong: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):
        cells = line.split()
        if not cells or line.lstrip().startswith("#") or tuple(cells[:3]) == COLUMNS[:3]:
            continue
        try:
            if cells[0] in named:
                raise BadInput(f"{cells[0]} stands there twice")
            named.add(cells[0])
            choices[cells[0]] = _choice(cells, shapes)
        except ValueError as error:
            wrong.append(f"line {number}: {error}")
    missing = [module for module in shapes if module not in named]
    if missing:
        wrong.append(f"{len(missing)} weights have no line: {listing(missing)}")
    if not wrong:
        wrong = _mixed(choices)
    if wrong:
        raise BadInput(f"{where} cannot be used: {listing(wrong, 3, separator='; ')}")
    return Allocation({module: choices[module] for module in shapes}, remarks=_remarks(text))


def _choice(cells: Sequence[str], shapes: Mapping[str, tuple[int, int]]) -> Choice:
    """Of one line; a ValueError says what is wrong with it."""
    if len(cells) < 3:
        raise BadInput("a weight, a codec and a rank are needed")
    module, name, rank = cells[:3]
    if module not in shapes:
        raise BadInput(f"{module} is no weight that is split here")
    most = min(shapes[module])
    if not rank.isdecimal() or int(rank) > most:
        raise BadInput(f"rank {rank} is outside 0..{most}, the ranks of {module} {list(shapes[module])}")
    return Choice(codec_named(name), int(rank))


def _mixed(choices: Mapping[str, Choice]) -> list[str]:
    """bitsandbytes' codec needs its own layout, which the others do not have."""
    plain = {spelling(choice.codec) for choice in choices.values() if isinstance(choice.codec, NormalFloat4)}
    others = [module for module, choice in choices.items() if not isinstance(choice.codec, NormalFloat4)]
    if plain and (others or len(plain) > 1):
        names = ", ".join(sorted(plain))
        return [
            f"{names} is bitsandbytes' and stands for all weights or for none; nf4-64-8x256 may stand beside others"
        ]
    return []


def _remarks(text: str) -> tuple[str, ...]:
    lines = (line.strip() for line in text.split("\n"))
    return tuple(line.removeprefix("#").strip() for line in lines if line.startswith("#") and line != TITLE)
