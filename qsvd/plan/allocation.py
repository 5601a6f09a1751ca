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
from typing import Any, Literal

from torch import nn

from qsvd.errors import BadInput, listing, one_line
from qsvd.numerics.codec import Codec
from qsvd.numerics.int4 import GROUPS, Int4
from qsvd.numerics.names import codec_named, spelling
from qsvd.numerics.nf4 import NormalFloat4
from qsvd.plan.weights import ModelPlan, WeightSpec
from qsvd.records import Role

TITLE = "# qsvd allocation"
EXPERT_RANK = 16  # of the components of an expert, unless another is asked for
LEVELS_BYTES, NESTED_LEVELS_BYTES = 64, 1024  # float32 tables that bitsandbytes stores with every weight
TABLE_CODECS = {8: "nf8-64-8x256", 4: "nf4-64-8x256"}  # of the embedding and the head, by bits
STATE_BYTES = 320  # most bytes of the JSON of one weight's quantization state
SHAPE_BYTES = 16  # of weight_shape, which compressed-tensors stores with every weight
COLUMNS = ("weight", "codec", "rank", "bits", "error")
Layout = Literal["bitsandbytes", "compressed-tensors", "qsvd"]


@dataclass(frozen=True)
class Choice:
    """The codec and the rank of one weight."""

    codec: Codec
    rank: int

    def num_bytes(self, shape: tuple[int, int], factor_bytes: int = 2) -> int:
        """Return the bytes stored for an [O, I] weight: the residual, and factors of `factor_bytes` per number."""
        return residual_bytes(self.codec, shape) + factor_bytes * self.rank * sum(shape)


@dataclass(frozen=True)
class Table(WeightSpec):
    """The token embedding or the output head, quantized without components; its module is the one that holds it.

    Args:
        codec: Of its residual.
        others: Names in the model that share the tensor: a tied head, the embedding of a decoder.
    """

    codec: Codec = field(kw_only=True)
    others: tuple[str, ...] = ()


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
    def layout(self) -> Layout:
        """Whose tensors the residuals are stored as: the first two load without qsvd, and have one codec for all."""
        codecs = {choice.codec.name: choice.codec for choice in self.choices.values()}
        codec = next(iter(codecs.values())) if len(codecs) == 1 else None
        if isinstance(codec, NormalFloat4):
            return "bitsandbytes"
        return "compressed-tensors" if isinstance(codec, Int4) else "qsvd"


def residual_bytes(codec: Codec, shape: tuple[int, int]) -> int:
    """Return the bytes of an [O, I] residual in a file: for bitsandbytes' NF4, with tables and JSON, an upper bound."""
    if isinstance(codec, Int4):
        return codec.num_bytes(shape) + SHAPE_BYTES
    if not isinstance(codec, NormalFloat4):
        return codec.num_bytes(shape)
    tables = LEVELS_BYTES + (NESTED_LEVELS_BYTES if codec.double_quant else 0)
    return codec.num_bytes(shape) + tables + STATE_BYTES


def uniform(weights: Sequence[WeightSpec], choice: Choice, expert_rank: int | None = None) -> Allocation:
    """Return the same choice for every weight; experts have their own rank, at most EXPERT_RANK by default."""
    rank = min(choice.rank, EXPERT_RANK) if expert_rank is None else expert_rank
    of_expert = Choice(choice.codec, rank)
    return Allocation({spec.module: of_expert if spec.stack else choice for spec in weights})


def check_ranks(allocation: Allocation, weights: Sequence[WeightSpec]) -> None:
    """Refuse, by BadInput, a rank above the shorter side of a weight."""
    for flag, kind in (
        ("--rank", [s for s in weights if not s.stack]),
        ("--expert-rank", [s for s in weights if s.stack]),
    ):
        small = [spec for spec in kind if min(spec.shape) < allocation.choices[spec.module].rank]
        if small:
            rank, limit = allocation.choices[small[0].module].rank, min(min(spec.shape) for spec in kind)
            raise BadInput(
                f"{flag} {rank} is above the shorter side of {len(small)} weights: "
                f"{listing([f'{spec.module} {list(spec.shape)}' for spec in small])}; "
                f"give at most {limit}, or --exclude them"
            )


def with_tables(allocation: Allocation, tables: Sequence[Table]) -> Allocation:
    """Return the allocation with the choices of embedding and head."""
    choices = {table.module: Choice(table.codec, 0) for table in tables}
    return Allocation({**allocation.choices, **choices}, allocation.errors, allocation.remarks)


def usual_codec(weights: Sequence[WeightSpec], *, double_quant: bool, packed: bool = False, name: str = "nf4") -> Codec:
    """Return the codec without a budget: bitsandbytes' NF4, or the same in qsvd's layout; or the one that is named.

    Args:
        packed: Whether another part of the model needs qsvd's layout; so do layers that are not plain.
        name: The option --codec.

    Raises:
        BadInput: the named codec cannot hold a weight.
    """
    if name != "nf4":
        codec = codec_named(name)
        if wrong := holding_problems({spec.group: codec for spec in weights}, weights):
            raise BadInput(f"--codec {name}: {listing(wrong, separator='; ')}")
        return codec
    if not packed and all(spec.is_plain for spec in weights):
        return NormalFloat4(double_quant=double_quant)
    return codec_named("nf4-64-8x256" if double_quant else "nf4-64-fp32")


def tables_of(plan: ModelPlan, head_bits: int | None, embedding_bits: int | None) -> tuple[Table, ...]:
    """Return the embedding and the head that are to be quantized, under the names of the checkpoint if it is known.

    A tied head is not in the list: it shares the tensor of the embedding, which is quantized once.

    Args:
        plan: With its model.

    Raises:
        BadInput: the model has none, or its layer is of another kind; 4 bits are asked for a tied head.
    """
    if head_bits is None and embedding_bits is None:
        return ()
    assert plan.model is not None, "plan_model keeps it"
    model, paths = plan.model, {id(module): path for path, module in plan.model.named_modules()}
    head: Any = model.get_output_embeddings()
    if head_bits is not None and (head is None or type(head) is not nn.Linear):
        raise BadInput(f"--head-bits: {plan.architecture} has no output head that is a plain nn.Linear; leave it out")
    embedding = _embedding_of(plan) if embedding_bits is not None or shared(plan, paths[id(head)]) else None
    others = () if embedding is None else shared(plan, paths[id(embedding)])
    is_tied = head is not None and f"{paths[id(head)]}.weight" in others
    if is_tied and head_bits == 4:
        raise BadInput(
            f"--head-bits 4: the output head of {plan.architecture} shares its tensor with the token embedding, which "
            "takes 8 bits; give --head-bits 8"
        )
    found = []
    if embedding is not None:
        found.append(_table(plan, paths[id(embedding)], "embedding", 8, others))
    if head_bits is not None and not is_tied:
        found.append(_table(plan, paths[id(head)], "head", head_bits, ()))
    return tuple(found)


def _embedding_of(plan: ModelPlan) -> nn.Embedding:
    assert plan.model is not None, "plan_model keeps it"
    try:
        embedding = plan.model.get_input_embeddings()
    except NotImplementedError:
        embedding = None
    if not isinstance(embedding, nn.Embedding):
        raise BadInput(f"{plan.architecture} has no token embedding that can be quantized; leave --embedding-bits out")
    return embedding


def shared(plan: ModelPlan, path: str) -> tuple[str, ...]:
    """Return the names of the model that share the weight of a module, without its own."""
    own = f"{path}.weight"
    source = plan.tied.get(own, own)
    group = {source, *(name for name, other in plan.tied.items() if other == source)}
    return tuple(sorted(group - {own}))


def _table(plan: ModelPlan, path: str, role: Role, bits: int, others: tuple[str, ...]) -> Table:
    name = f"{path}.weight"
    rows, columns = plan.shapes[name]
    if plan.spelling and name not in plan.spelling:
        raise BadInput(
            f"the checkpoint has no tensor for {name}, but for {listing(others)}, which shares it; load the model with "
            "transformers, save it again, and quantize that"
        )
    spelled = plan.spelling.get(name, name)
    return Table(spelled, path, (rows, columns), role, -1, codec=codec_named(TABLE_CODECS[bits]), others=others)


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
    lines = [TITLE, *(f"# {one_line(remark)}" for remark in allocation.remarks)]
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
        codecs = {group: choice.codec for group, choice in choices.items()}
        wrong = mixing_problems(codecs.values()) or holding_problems(codecs, weights)
    if wrong:
        raise BadInput(f"{where} cannot be used: {listing(wrong, 3, separator='; ')}")
    return Allocation({spec.module: choices[spec.group] for spec in weights}, remarks=remarks)


def holding_problems(codecs: Mapping[str, Codec], weights: Sequence[WeightSpec]) -> list[str]:
    """Say which weights a codec cannot hold.

    bitsandbytes and compressed-tensors do not replace subclasses of nn.Linear, nor the latter GPT-2's Conv1D. Its
    groups divide the inputs of a layer.

    Args:
        codecs: By the group of the weight.
    """
    problems = []
    groups = dict.fromkeys(spec.group for spec in weights if not spec.is_plain)
    if wrong := [group for group in groups if isinstance(codecs[group], NormalFloat4)]:
        problems.append(f"bitsandbytes does not replace {listing(wrong)}; use nf4-64-8x256 for all weights")
    others = dict.fromkeys(spec.group for spec in weights if not spec.stack and spec.read_from[0].is_transposed)
    if wrong := [group for group in groups | others if isinstance(codecs[group], Int4)]:
        problems.append(f"compressed-tensors does not replace {listing(wrong)}; use another codec, or --exclude them")
    return problems + _odd_groups(codecs, weights)


def _odd_groups(codecs: Mapping[str, Codec], weights: Sequence[WeightSpec]) -> list[str]:
    odd: dict[str, int] = {}
    for spec in weights:
        codec, columns = codecs[spec.group], spec.shape[1]
        if isinstance(codec, Int4) and not codec.fits(columns):
            odd[spec.group] = columns
    if not odd:
        return []
    named = listing([f"{group} ({columns} inputs)" for group, columns in odd.items()])
    smaller = [f"int4-{group}" for group in GROUPS if not any(columns % group for columns in odd.values())]
    advice = f"use {smaller[-1]}, or --exclude these layers" if smaller else "--exclude these layers"
    codec = next(iter(codecs[group].name for group in odd))
    return [f"groups of {codec} do not divide the inputs of {len(odd)} layers: {named}; {advice}"]


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
    """Say which codecs cannot be in one model: those of other libraries have their layout, so that they are alone."""
    kinds = {NormalFloat4: "bitsandbytes", Int4: "compressed-tensors"}
    names = {codec.name: kinds.get(type(codec), "") for codec in codecs}
    if len(names) == 1 or not any(names.values()):
        return []
    named = {library: sorted(name for name in names if names[name] == library) for library in kinds.values()}
    alone = " and ".join(f"{' and '.join(codecs)} ({library})" for library, codecs in named.items() if codecs)
    return [f"{alone} cannot be mixed with other codecs; use one for all, or nf4-64-8x256 instead"]
