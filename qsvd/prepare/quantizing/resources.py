"""What a run of `qsvd quantize` needs before its work: an allocation for its budget, memory and disk space."""

from dataclasses import replace

from qsvd.errors import BadInput, DoesNotFit
from qsvd.files.atomic import write_text
from qsvd.files.quantize_folder import OutputFolder
from qsvd.files.workspace import MANIFEST
from qsvd.memory.other_tasks import plan_splitting
from qsvd.plan.allocation import from_text, residual_bytes, to_text
from qsvd.prepare.allocate import check_measuring, is_sealed, measure_and_solve, sealed
from qsvd.prepare.machine import check_room, machine
from qsvd.prepare.quantize import ALLOCATION, QuantizeRun
from qsvd.prepare.quantizing.calibration import block_bytes
from qsvd.records import ShowProgress
from qsvd.report.planning import lack


def resolve_allocation(run: QuantizeRun, folder: OutputFolder, show: ShowProgress) -> QuantizeRun:
    """Return a run with a --budget with its allocation: the weights are measured, then the budget is solved.

    Measurements, and the table that is solved, stay in the folder: a run that was stopped continues with the same
    table.

    Args:
        folder: The folder of the quantized model, not complete.
        show: Is called after every measured weight. What it raises ends the work; measured weights stay.

    Raises:
        BadInput: the budget cannot be met, or the solved table was edited.
    """
    kept = folder.unfinished / ALLOCATION
    if not kept.is_file():
        measuring = run.measuring
        allocation = measure_and_solve(measuring, show).allocation
        write_text(kept, sealed(to_text(allocation, run.plan.weights, measuring.task.factor_bytes)))
    text = kept.read_text(encoding="utf-8")
    if not is_sealed(text):
        raise BadInput(
            f"{kept} was edited, and weights may be split already by what it said before; copy it, and give the copy "
            "as --allocation with another --out"
        )
    return replace(run, allocation=from_text(text, run.plan.weights, str(kept)), table=text)


def check_resources(run: QuantizeRun) -> None:
    """Refuse, by DoesNotFit, what exceeds memory or disk. A complete quantized model needs nothing more."""
    if (run.out / MANIFEST).is_file():
        return
    if run.allocation is not None:
        _check_memory(run)
        check_room(run.out, run.sizes.disk)
        return
    measuring = run.measuring
    if not measuring.out.is_file():  # an earlier run measured the weights and solved the budget
        check_measuring(measuring)
    split = {source.tensor for spec in run.weights for source in spec.read_from}
    copied = sum(tensor.num_bytes for name, tensor in run.checkpoint.tensors.items() if name not in split)
    packed = sum(residual_bytes(table.codec, table.shape) for table in run.tables)
    # at worst all of the budget is there twice
    check_room(run.out, 2 * (measuring.task.budget.num_bytes + packed) + copied)


def _check_memory(run: QuantizeRun) -> None:
    """Refuse a run whose largest weight cannot be split in the memory that is free."""
    largest, *others = run.largest_stack
    choice, free = run.everything.choices[largest.module], machine(run.device, run.compute_dtype).limits
    count, copied, options = 1 + len(others), run.sizes.largest_copy, run.options
    plan = plan_splitting(
        largest.shape,
        choice,
        run.device.type,
        free,
        count=count,
        weighted=options.objective == "fisher",
        feeds_back=options.rounding == "feedback",
        moments=options.sensitivity or "none",
        block=block_bytes(options, run.plan, run.device),
        copied=copied,
    )
    if not plan.fits:
        raise DoesNotFit(
            f"{lack(plan)} to split {largest.name} {list(largest.shape)}; close other programs that use it, give "
            f"another --device, or {'leave it in 16 bits' if largest in run.tables else '--exclude the weight'}"
        )
