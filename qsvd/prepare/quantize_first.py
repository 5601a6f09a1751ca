"""`qsvd train` on a 16-bit model: the quantized model that is made first, where it is kept, and the run on it."""

import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from qsvd.adapters.gradients import open_gradients
from qsvd.adapters.methods.table import METHODS
from qsvd.errors import BadInput
from qsvd.files.adapter import read_adapter_record
from qsvd.files.quantize_folder import OutputFolder
from qsvd.files.workspace import ADAPTER_RECORD, ANOTHER_FOLDER, model_kind
from qsvd.inputs.paths import hub_id
from qsvd.options import Quantize, Train
from qsvd.plan.targets import target_names
from qsvd.prepare.check_options import check
from qsvd.prepare.machine import train_machine
from qsvd.prepare.plan import plan_of, plan_source, run_of_16_bit
from qsvd.prepare.quantize import QuantizeRun, prepare_quantize
from qsvd.prepare.train import PlannedRun, TrainRun, adapter_options_of, prepare_train
from qsvd.training.checkpoints import checkpoints
from qsvd.training.run_folder import check_run_folder, is_saved, recorded

UNKNOWN = ("alpha", "base_fingerprint")  # of the identity of a run, before its quantized model is complete


@dataclass(frozen=True)
class FirstRun(PlannedRun):
    """A checked run of `qsvd train` on a 16-bit model.

    Its options are those of the run on the quantized model, which `quantizing` makes.
    """

    quantizing: QuantizeRun

    @property
    def first_lines(self) -> list[str]:
        """What is said before the work."""
        options = self.quantizing.options
        return [*super().first_lines, f"First: {options.model} is quantized into {options.out}"]


def prepare_training(options: Train) -> TrainRun | FirstRun:
    """Check a run on a quantized model; or one on a 16-bit model, before the hours of quantizing it."""
    check(options)
    if model_kind(options.base) != "16-bit":
        ready = prepare_train(options)
        check_run_folder(ready.out, ready.identity, resume=options.resume, total=ready.total_steps)
        return ready
    here = train_machine(options)
    source = plan_source(plan_of(options), here.dtype)
    run = run_of_16_bit(options, source, here, must_fit=True, old=recorded(options.out.expanduser()))
    is_added = not METHODS[run.method].needs_components  # the adapter has a rank of its own, and no components
    quantizing = prepare_quantize(_quantize_options(options, 0 if is_added else source.rank), is_shown=options.preview)
    OutputFolder.check(quantizing.out, quantizing.identity, "give --quantized another folder")
    then = replace(
        run.options,
        base=str(quantizing.options.out),
        rank=options.rank if is_added else None,  # else it is the stored rank
        budget=None,
        allocation=None,
        include_towers=False,
        codec="nf4",
        double_quant=True,
        head_bits=None,
        embedding_bits=None,
        quantized=None,
    )
    known: dict[str, Any] = {field.name: getattr(run, field.name) for field in fields(run)} | {"options": then}
    found = FirstRun(**known, quantizing=quantizing)
    _check_base(found)
    _check_gradients(found)
    check_run_folder(found.out, found.identity, resume=options.resume, total=found.total_steps, unknown=UNKNOWN)
    return found


def _check_base(run: FirstRun) -> None:
    """Refuse a folder with a run on another quantized model, which is still there."""
    for folder in (run.out, *checkpoints(run.out)):
        if (folder / ADAPTER_RECORD).is_file():
            base = read_adapter_record(folder).base
            if Path(base).exists() and Path(base) != run.quantizing.out.resolve():
                raise BadInput(
                    f"{run.out} holds a run on {base}; give the same options to continue, or {ANOTHER_FOLDER}"
                )


def _check_gradients(run: FirstRun) -> None:
    """Refuse, before the hours of quantizing, gradients that the method cannot start from."""
    if is_saved(run.out):
        return
    options, source = adapter_options_of(run.options), run.quantizing
    options = replace(options, target_modules=target_names(options.target_modules))
    shapes = {spec.module: spec.shape for spec in source.plan.weights}
    open_gradients(run.method, options, source.checkpoint.fingerprint, shapes)


def on_quantized(run: TrainRun | FirstRun, work: Callable[[QuantizeRun], object]) -> TrainRun:
    """Return the run on its quantized model; a 16-bit model is quantized first, by `work`."""
    if isinstance(run, TrainRun):
        return run
    work(run.quantizing)
    torch.cuda.empty_cache()  # what quantizing leaves would count as taken
    return prepare_train(run.options, run.data)


def _quantize_options(options: Train, rank: int) -> Quantize:
    """Return the options of `qsvd quantize` for the run, which are those that `qsvd plan` counts with."""
    made = Quantize(
        model=options.base,
        out=_folder(options, rank) if options.quantized is None else options.quantized,
        rank=rank,
        expert_rank=options.expert_rank,
        include_towers=options.include_towers,
        codec=options.codec,
        double_quant=options.double_quant,
        head_bits=options.head_bits,
        embedding_bits=options.embedding_bits,
        device=options.device,
    )
    if options.allocation is not None:
        return replace(made, rank=Quantize.rank, allocation=options.allocation)
    if options.budget is not None:
        return replace(made, budget=options.budget, allocator="bits")
    return made


def _folder(options: Train, rank: int) -> Path:
    """Return OUT next to RUN, such as Qwen3-0.6B-nf4-r64."""
    name = hub_id(options.base, None) or os.path.abspath(Path(options.base).expanduser())
    model, bits = Path(name).name, options.codec if options.double_quant else f"{options.codec}-plain"
    if options.allocation is not None:
        return options.out.parent / f"{model}-{options.allocation.stem}{_variant(options)}"
    if options.budget is not None:
        bits = "".join(options.budget.split())
    return options.out.parent / f"{model}-{bits}-r{rank}{_variant(options)}"


def _variant(options: Train) -> str:
    """Return the end of the name of OUT: "-head8" if the head has 8 bits, "-towers" if towers are quantized."""
    bits = {"head": options.head_bits, "embedding": options.embedding_bits}
    tables = "".join(f"-{name}{count}" for name, count in bits.items() if count is not None)
    return f"{tables}-towers" if options.include_towers else tables
