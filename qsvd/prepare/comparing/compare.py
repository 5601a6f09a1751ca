"""Options of `qsvd compare` to a checked comparison: its rows, the parts of the data, the models to quantize."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qsvd.adapters.adapter import check_alpha
from qsvd.adapters.methods.table import METHODS
from qsvd.data.columns import Tokenized
from qsvd.data.examples import Home, RunData, read_run_data
from qsvd.errors import BadInput, listing
from qsvd.files.source import small_files
from qsvd.memory.device import device_of
from qsvd.options import Compare, Quantize, Train
from qsvd.prepare.check_options import check
from qsvd.prepare.comparing.parts import Parts, divide
from qsvd.prepare.comparing.rows import MethodSpec, SplitSpec, changed, is_named, read_specs
from qsvd.prepare.comparing.sizes import Size, Sizes, best_within, limit_of, measure
from qsvd.prepare.quantize import QuantizeRun, prepare_quantize
from qsvd.prepare.train import SMALL
from qsvd.training.cells import Cell
from qsvd.training.rates import first_rates

HIGHER = 10  # times the default rate, which is for models of 7B, is the middle of the sweep of a model below SMALL
PLACES = ("base", "data", "out", "valid", "learning_rate", "seed", "device")  # of a run, which its key does not have


@dataclass(frozen=True)
class Row:
    """One row of a comparison.

    Args:
        options: Of its runs, without rate, seed and folder.
        quantized: The folder of its quantized model.
        rates: Those that the sweep begins with.
        grows: Whether the sweep may try others.
        key: What the numbers of all its cells depend on.
    """

    split: SplitSpec
    method: MethodSpec
    size: Size
    options: Train
    quantized: Path
    rates: tuple[float, ...]
    grows: bool
    key: Mapping[str, Any]

    def cell(self, rate: float, seed: int) -> Cell:
        """Return the cell of one run."""
        name = f"{self.method.method}-r{self.size.rank or self.size.stored_rank}-{rate:g}-{seed}"
        return Cell(name, {**self.key, "learning_rate": rate, "seed": seed})

    @property
    def split_name(self) -> str:
        """The options of its split, with the rank."""
        rank = f"--rank {self.size.stored_rank}"
        return self.split.text if self.split.has_rank else " ".join([*self.split.text.split(), rank])


@dataclass(frozen=True)
class LeftOut:
    """A split and a method that are no row, and why."""

    split: str
    method: str
    reason: str


@dataclass(frozen=True)
class CompareRun:
    """A checked comparison.

    Args:
        limit: What all rows have in common: a rank, trained parameters or bytes.
        test: The examples of the test part.
        quantizing: The models to quantize, by folder.
    """

    options: Compare
    rows: tuple[Row, ...]
    left_out: tuple[LeftOut, ...]
    limit: int
    data: RunData
    test: Tokenized
    digests: Mapping[str, str]
    quantizing: Mapping[Path, QuantizeRun]

    @property
    def out(self) -> Path:
        """The folder of the comparison."""
        return self.options.out.expanduser()


def prepare_compare(options: Compare, home: Path | None = None) -> CompareRun:
    """Read the rows, choose their ranks, read the data, and refuse what cannot be compared, before any slow work.

    Args:
        home: Folder for the parts of the data; None is that of the comparison.
    """
    check(options)
    splits, methods = read_specs(options)
    sizes = Sizes(options.model)
    limit = limit_of(options, lambda: sizes.size(splits[0], methods[0], 16))
    chosen, left = _sized(options, splits, methods, sizes, limit)
    parts = divide(options.data, options.out.expanduser() if home is None else home)
    parts.write()
    data, test = _read(options, methods[0], parts, sizes)
    making = _Making(options, parts, parts.digests, HIGHER if sizes.elements < SMALL else 1, {})
    rows = tuple(making.row(*one) for one in chosen)
    return CompareRun(options, rows, tuple(left), limit, data, test, making.digests, making.quantizing)


def _sized(
    options: Compare, splits: list[SplitSpec], methods: list[MethodSpec], sizes: Sizes, limit: int
) -> tuple[list[tuple[SplitSpec, MethodSpec, Size]], list[LeftOut]]:
    """Return the rows with their sizes, and what is left out; a method that was named and fits no split is refused."""
    chosen: list[tuple[SplitSpec, MethodSpec, Size]] = []
    left: list[LeftOut] = []
    wrong: dict[str, str] = {}
    for split in splits:
        for method in methods:
            try:
                chosen.append((split, method, _size(options, split, method, sizes, limit)))
            except OutOfReach as error:
                left.append(LeftOut(split.text, method.text, str(error)))
            except BadInput as error:
                left.append(LeftOut(split.text, method.text, str(error)))
                if is_named(options, method):
                    wrong.setdefault(method.text, f"--methods {method.text!r}: {error}")
    able = {method.text for _, method, _ in chosen}
    if refused := [sentence for text, sentence in wrong.items() if text not in able]:
        raise BadInput("; ".join(refused))
    if not chosen:
        raise BadInput(f"no row is left: {listing([f'{one.method} ({one.reason})' for one in left], separator='; ')}")
    return chosen, left


class OutOfReach(BadInput):
    """A row cannot have the rank, the parameters or the bytes of the others."""


def _size(options: Compare, split: SplitSpec, method: MethodSpec, sizes: Sizes, limit: int) -> Size:
    """Return the rank of a row and what it counts."""
    kind = METHODS[method.method]
    if kind.starts_from_gradient and getattr(method.options, "gradients", None) is None:
        raise BadInput(f"{method.method} needs --gradients FILE, which qsvd calibrate --gradient-rank writes")
    if not kind.takes_rank:
        return _stored_size(options, split, method, sizes, limit)
    given = limit if options.equal == "rank" and method.options.rank is None else method.options.rank
    return _within(options, split, method, sizes, limit, given)


def _stored_size(options: Compare, split: SplitSpec, method: MethodSpec, sizes: Sizes, limit: int) -> Size:
    """Return the size of a method that trains the components as they are stored."""
    if split.is_mixed:
        raise OutOfReach(f"{method.method} trains the ranks that the split gives each layer, which no --size sets")
    given = split.options.rank if split.has_rank else limit if options.equal == "rank" else None
    if options.equal == "rank" and given != limit:
        raise OutOfReach(f"it trains the stored rank {given}, and all rows have rank {limit}")
    found = _within(options, split, method, sizes, limit, given)
    check_alpha(method.method, found.stored_rank or 0, method.options.alpha)
    return found


def _within(  # what a size depends on
    options: Compare, split: SplitSpec, method: MethodSpec, sizes: Sizes, limit: int, given: int | None
) -> Size:
    """Return the size at a rank; without one, the largest that is not above the limit."""
    equal = options.equal
    if given is None:
        most = sizes.most_rank(split)
        given = best_within(lambda rank: measure(equal, sizes.size(split, method, rank)), limit, most)
    if given is None:
        least = sizes.size(split, method, 1)
        raise OutOfReach(f"{measure(equal, least):,} {equal} at rank 1, more than {limit:,}")
    found = sizes.size(split, method, given)
    if equal != "rank" and measure(equal, found) > limit:
        raise OutOfReach(f"{measure(equal, found):,} {equal} at rank {given}, more than {limit:,}")
    return found


def _read(options: Compare, method: MethodSpec, parts: Parts, sizes: Sizes) -> tuple[RunData, Tokenized]:
    """Return the data to train with those that choose the rate, and the data to test."""
    made = replace(method.options, base=options.model, data=str(parts.files["train"]))
    home = Home(options.model, small_files(options.model), sizes.architecture)
    data = read_run_data(replace(made, valid=str(parts.files["valid"])), home)
    test = read_run_data(replace(made, valid=str(parts.files["test"])), home).held_out
    assert test is not None, "a part that is there"
    if data.train.label_names != test.label_names:
        raise BadInput(f"the test part of {options.data} has other labels than the training part")
    return data, test


@dataclass(frozen=True)
class _Making:
    """What rows are made of; `quantizing` gets the models that they need."""

    options: Compare
    parts: Parts
    digests: Mapping[str, str]
    middle: float  # times the default rate of a method, where its sweep begins
    quantizing: dict[Path, QuantizeRun]

    def row(self, split: SplitSpec, method: MethodSpec, size: Size) -> Row:
        """Return a row."""
        options, parts = self.options, self.parts
        how = replace(split.options, model=options.model, calibrate=_calibrate(options, split.options, parts))
        how = how if size.stored_rank is None else replace(how, rank=size.stored_rank)
        named = changed(how, ("model", "out", "device", "shard_size"))
        words = json.dumps(named, sort_keys=True, ensure_ascii=False)
        name = f"r{how.rank}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"
        out = options.out.expanduser() / "splits" / name
        if out not in self.quantizing:
            self.quantizing[out] = prepare_quantize(replace(how, out=out))
        fixed = method.options.learning_rate
        rates = options.rates if fixed is None else (fixed,)
        made = replace(method.options, base=str(out), data=str(parts.files["train"]), valid=str(parts.files["valid"]))
        made = replace(made, rank=size.rank)
        key = {
            "model": self.quantizing[out].checkpoint.fingerprint,
            "data": self.digests,
            "split": named,
            "run": changed(made, PLACES),
            "device": device_of(options.device).type,
        }
        first = rates or first_rates(METHODS[method.method].defaults.learning_rate * self.middle)
        return Row(split, method, size, made, out, tuple(sorted({*first})), not rates, key)


def _calibrate(options: Compare, split: Quantize, parts: Parts) -> str | None:
    """Return the texts of a split: DATA itself stands for its training part, so that nothing sees the other parts."""
    return str(parts.files["train"]) if split.calibrate == options.data else split.calibrate
