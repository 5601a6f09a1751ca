"""Options of `qsvd aggregate` to a checked run: the runs to average, on one quantized model, and the new adapter."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.methods.lora import Lora
from qsvd.adapters.methods.table import METHODS, export_refusal
from qsvd.adapters.start import new_record
from qsvd.errors import BadInput, listing
from qsvd.files.adapter import PARAMETERS, AdapterRecord, read_adapter_record
from qsvd.files.readers import content_digest
from qsvd.files.split_folder import SplitFolder
from qsvd.options import Aggregate
from qsvd.prepare.check_options import check
from qsvd.prepare.models import Opened, open_trained


@dataclass(frozen=True)
class AggregateRun:
    """A checked run of `qsvd aggregate`.

    Args:
        runs: The runs to average.
        shares: The share of each in the average; their sum is 1.
        record: Of the new adapter.
    """

    options: Aggregate
    split: SplitFolder
    runs: tuple[Opened, ...]
    shares: tuple[float, ...]
    record: AdapterRecord

    @property
    def out(self) -> Path:
        """The folder of the new adapter."""
        return self.options.out.expanduser()

    @property
    def rank(self) -> int:
        """The rank of the average, of all layers but experts."""
        return self.record.rank or Lora.defaults.rank_of(AdapterOptions(), 0)

    @property
    def identity(self) -> dict[str, Any]:
        """What the bytes of the adapter depend on."""
        digests = [content_digest(Path(name).expanduser() / PARAMETERS) for name in self.options.runs]
        return {
            "runs": hashlib.sha256(" ".join(digests).encode()).hexdigest(),
            "base_fingerprint": self.split.fingerprint,
            "rank": self.rank,
            "weights": list(self.shares),
        }


def prepare_aggregate(options: Aggregate) -> AggregateRun:
    """Open the runs, and refuse those whose average is no LoRA on one quantized model.

    Raises:
        BadInput: the runs are on different models, have other classes or chat templates, or a method whose trained part
            is not a product of two factors.
    """
    check(options)
    records = {name: read_adapter_record(Path(name).expanduser()) for name in options.runs}
    first = options.runs[0]
    for name, record in records.items():
        _check_method(name, record.method)
        if record.fingerprint != records[first].fingerprint:
            raise BadInput(
                f"{name} was trained on another quantized model than {first}: the fingerprints differ "
                f"({record.fingerprint[:12]} and {records[first].fingerprint[:12]}); give runs on one model"
            )
        if record.labels != records[first].labels:
            there, here = (listing(one.labels) or "none" for one in (record, records[first]))
            raise BadInput(f"{name} has the classes {there}, and {first} has {here}; give runs with the same classes")
    runs = tuple(open_trained(Path(name), options.base) for name in options.runs)
    templates = [run.adapter.chat_template for run in runs if run.adapter is not None]
    for name, template in zip(options.runs, templates, strict=True):
        if template != templates[0]:
            raise BadInput(f"{name} was trained with another chat template than {first}; give runs with the same one")
    total = sum(options.weights)
    shares = tuple(weight / total for weight in options.weights) or tuple(1 / len(runs) for _ in runs)
    split = runs[0].split
    return AggregateRun(options, split, runs, shares, _new_record(options, split, records))


def _check_method(name: str, method: str) -> None:
    """Refuse a method whose trained part is not a product of two factors beside Q."""
    if METHODS[method].has_gain:
        raise BadInput(
            f"{name} was trained by {method}, which scales the rows of each weight: the average of such weights is not "
            "a product of two factors; give runs of methods that qsvd methods lists as PEFT LoRA"
        )
    if refusal := export_refusal(method, "peft"):
        raise BadInput(f"{name} was trained by {method}, and cannot be averaged: {refusal}")


def _new_record(options: Aggregate, split: SplitFolder, records: Mapping[str, AdapterRecord]) -> AdapterRecord:
    """Return the record of a LoRA whose scale is 1, on all layers that a run has trained."""
    stored = max(split.module_ranks.values())
    ranks = [METHODS[one.method].defaults.rank_of(AdapterOptions(rank=one.rank), stored) for one in records.values()]
    rank = max(ranks) if options.rank is None else options.rank
    usual = Lora.defaults.rank_of(AdapterOptions(), 0)
    targets = [one.target_modules for one in records.values()]
    chosen = AdapterOptions(
        "lora",
        rank=None if rank == usual and options.rank is None else rank,  # the usual one is lower for experts
        alpha=float(rank),
        dtype="float32",
        target_modules=tuple(sorted({name for names in targets for name in names})) if all(targets) else (),
    )
    first = next(iter(records.values()))
    return replace(new_record(split, chosen, first.labels), full=first.full)
