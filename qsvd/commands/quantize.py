"""`qsvd quantize`: one weight after another from the 16-bit model into OUT, then the files around them."""

import logging
import math
import sys
from collections.abc import Iterator, Sequence
from functools import partial

from torch import Tensor

from qsvd import ranks
from qsvd.calibrate.block_walk import BlockWalk
from qsvd.commands.report import load_report, push_quantized, show_report
from qsvd.console.progress import Stopwatch, explained_disk_errors, say, terminal, watched
from qsvd.errors import BadInput, listing
from qsvd.export.hub import open_repository
from qsvd.files.atomic import changed_files, file_digest
from qsvd.files.quantize_folder import BackgroundWriter, OutputFolder
from qsvd.files.quantized.padding import padding_of
from qsvd.files.readers import is_whole, stream
from qsvd.files.safetensors import digest_of, read_header
from qsvd.files.source import Checkpoint, place_of
from qsvd.files.split_folder import dense_weight, open_split
from qsvd.files.workspace import ANOTHER_FOLDER, UNFINISHED
from qsvd.inputs.model_files import TOKENIZER, damaged_file
from qsvd.memory.other_tasks import waiting_bytes
from qsvd.numerics.names import spelling
from qsvd.options import Quantize
from qsvd.prepare.machine import check_room
from qsvd.prepare.outputs import (
    copied_tensor,
    error_change,
    misplaced_layers,
    parted_layers,
    planned_tables,
    tensors_of,
    write_outputs,
)
from qsvd.prepare.quantize import QuantizeRun, prepare_quantize
from qsvd.prepare.quantizing.division import Elsewhere, owners
from qsvd.prepare.quantizing.resources import check_resources, resolve_allocation
from qsvd.records import Progress, ShowProgress, WeightError, show_nothing
from qsvd.report.errors import from_record, to_record
from qsvd.report.next_commands import after_quantize, last_lines
from qsvd.report.results import QuantizeResult
from qsvd.report.totals import totals

WITHOUT_TOKENIZER = "%s; the model is quantized all the same, but qsvd train and eval refuse it like that"


def main(options: Quantize, checkpoint: Checkpoint | None = None) -> None:
    """Run `qsvd quantize`: 1 check, 2 quantize (see `quantize_run`) and show progress, 3 report.

    Args:
        checkpoint: An open one; None opens options.model.

    Raises:
        Interrupted: after Ctrl-C; finished weights are kept.
    """
    run = ranks.main_first(lambda: prepare_quantize(options, checkpoint))
    if options.dry_run:
        check_room(run.out, run.sizes.disk)
        terminal().print(planned_tables(run), soft_wrap=True)
        return
    repository = ranks.from_main(lambda: open_repository(options))
    quantize_visibly(run)
    if not ranks.is_main():
        return
    show_report(run.out, worst=5)
    say(f"\n{run.out}")
    say(last_lines("a quantized model", options.out, after_quantize(options.out)), file=sys.stderr)
    if repository is not None:
        say(push_quantized(run.out, repository))


def quantize(options: Quantize, show: ShowProgress = show_nothing) -> QuantizeResult:
    """Quantize a 16-bit model as `qsvd quantize` does, silently, and return the quantized model with its error.

    Raises:
        BadInput: an option, or the 16-bit model, cannot be used.
        DoesNotFit: there is too little memory or disk space.
        OSError: the folder cannot be written. Finished weights are kept, and the same call continues there.
    """
    ranks.check_alone("qsvd.quantize")
    run, repository = prepare_quantize(options), open_repository(options)
    quantize_run(run, show)
    url = None if repository is None else push_quantized(run.out, repository)
    _, errors = load_report(run.out)
    return QuantizeResult(run.out, tuple(errors), tuple(totals(errors)), url=url)


def quantize_visibly(run: QuantizeRun) -> None:
    """Do the work of a checked run and show progress.

    Raises:
        Interrupted: after Ctrl-C; finished weights are kept.
    """
    for warning in filter(None, (run.cut, parted_layers(run), misplaced_layers(run))):
        say(warning, file=sys.stderr)
    kept = f"finished work is kept, the same command continues in {run.out}"
    with explained_disk_errors(run.out / UNFINISHED, kept), watched("weight", kept) as show:
        times = quantize_run(run, show)
    say(f"{run.out} was complete already" if times is None else times.line(), file=sys.stderr)


def quantize_run(run: QuantizeRun, show: ShowProgress) -> Stopwatch | None:
    """Do the work of a checked run: 1 resources, 2 bits and ranks, 3 weight by weight, 4 the files around them.

    Several processes divide the weights of 3; the first one does the rest.

    Args:
        show: Is called after every weight. What it raises ends the work: nothing is lost, and the same run continues
            there, to the same bytes.

    Returns:
        Where the time of 3 and 4 went; None if there was nothing to do.
    """
    check_resources(run)  # 1: before the folder is made
    with ranks.main_first(lambda: OutputFolder(run.out, run.identity, rank=ranks.rank())) as folder:
        if folder.is_complete:
            open_split(run.out)  # refuses a damaged one
            return None
        if run.allocation is None:  # 2: a budget
            run = ranks.main_first(partial(resolve_allocation, run, folder, show))
            check_resources(run)
        padding = None
        if ranks.is_main():
            check_source_files(run, folder)
            padding = _padding(run.checkpoint)
            drop_damaged(run, folder)
        times = Stopwatch("splitting and measuring")
        split_weights(run, folder, show, times)  # 3
        if ranks.is_main():
            with times.waiting("writing"):
                write_outputs(run, folder, padding)  # 4
    ranks.barrier()
    return times


def _padding(checkpoint: Checkpoint) -> tuple[str, int] | None:
    """Return the padding token of a model whose tokenizer is copied; a tokenizer of another library is named.

    Raises:
        BadInput: a file of the tokenizer is damaged.
    """
    homes = [file.parent for file in checkpoint.other_files if file.name.startswith("tokenizer")]
    home = homes[0] if homes else checkpoint.folder
    if home is not None and (damaged := damaged_file(home, TOKENIZER)):
        raise BadInput(f"{damaged}; download it again, or copy it from where it is whole")
    try:
        return padding_of(home, checkpoint.config_json)
    except BadInput as error:
        logging.getLogger("qsvd").warning(WITHOUT_TOKENIZER, error)
        return None


def split_weights(run: QuantizeRun, folder: OutputFolder, show: ShowProgress, times: Stopwatch) -> None:
    """Split what is not split yet, and write every shard that is not there.

    The next weights are read and the last ones are written at the same time. With --calibrate the weights come in the
    order of the walk over the blocks, else in the order of the files.
    """
    done = {*ranks.from_main(lambda: [number for number in range(len(run.weights)) if folder.is_done(number)])}
    tally = Tally(run, show, frozenset(done))
    turns = [stack for stacks in run.stacks for stack in stacks]
    has_more = any(not done.issuperset(stack) for stack in turns)
    with times.waiting("calibrating"):
        walk = run.open_walk(tally.tell) if run.examples and has_more else None
    if walk is not None:
        turns.sort(key=lambda stack: walk.place(run.weights[stack[0]]))
    pending = [stack for stack in turns if not done.issuperset(stack)]  # as a whole, since bytes depend on the stack
    owner = owners(run.weights, pending)
    mine, elsewhere = [stack for stack in pending if owner[stack] == ranks.rank()], Elsewhere(folder, owner)
    tensors = stream(run.checkpoint, [[run.weights[number] for number in stack] for stack in mine])
    largest, *others = run.largest_stack
    waiting = waiting_bytes(largest.shape, run.everything.choices[largest.module], 1 + len(others))
    with BackgroundWriter(folder, waiting) as writer:
        shards = Shards(run, writer, tally)
        for stack in turns:
            if owner.get(stack) == ranks.rank():
                shards.add(stack, split_stack(run, stack, tensors, writer, times, walk))
            else:
                elsewhere.add(stack)
                if walk is not None:
                    walk.take(run.weights[stack[0]], partial(_dense, run, writer, stack[0]))
            shards.add_finished(elsewhere)
        with times.waiting("writing"):
            ranks.wait_until(lambda: shards.add_finished(elsewhere))
            writer.wait()


class Shards:
    """The output files that are not there, each written when its last weight is finished, by the first process."""

    def __init__(self, run: QuantizeRun, writer: BackgroundWriter, tally: "Tally"):
        self._run, self._writer, self._tally = run, writer, tally
        lacking = [shard for shard in run.shards if not (run.out / shard.file).is_file()] if ranks.is_main() else []
        self._left = {shard: set(shard.weights) for shard in lacking}
        self._write(())

    def add(self, stack: Sequence[int], errors: Sequence[WeightError]) -> None:
        """Count a stack that is finished or passed to the writer."""
        self._tally.add(stack, errors)
        self._write(stack)

    def add_finished(self, elsewhere: Elsewhere) -> bool:
        """Count the stacks that others finished; return whether none is missing."""
        folder = self._writer.folder
        for stack in elsewhere.arrived():
            self.add(stack, [from_record(folder.weight_record(number)) for number in stack])
        return elsewhere.is_all

    def _write(self, finished: Sequence[int]) -> None:
        for shard, left in [*self._left.items()]:
            left.difference_update(finished)
            if not left:
                del self._left[shard]
                copied = [copied_tensor(self._run, name) for name in shard.copied]
                self._writer.write_shard(shard.file, shard.weights, copied)


def _dense(run: QuantizeRun, writer: BackgroundWriter, number: int) -> Tensor:
    """Read Q + B A of a weight that an earlier run finished, or another process finishes, float32 [O, I]."""
    writer.wait()  # a shard that is being written removes the files of its weights
    ranks.wait_until(lambda: writer.folder.is_done(number))
    spec = run.weights[number]
    file = next(shard.file for shard in run.shards if number in shard.weights)
    choice = run.everything.choices[spec.module]
    known = {"module": spec.module, "shape": spec.shape, "codec": spelling(choice.codec), "rank": choice.rank}
    read = partial(dense_weight, run.out, spec.name, known)
    try:
        return read(writer.folder.entries(number, file))
    except FileNotFoundError:  # the first process has moved it to its shard meanwhile
        return read(writer.folder.entries(number, file))


class Tally:
    """The weights that are finished, and their errors; shown after each."""

    def __init__(self, run: QuantizeRun, show: ShowProgress, done: frozenset[int]):
        self._run, self._show, self._done = run, show, done
        self._finished, self._bytes, self._new = 0, 0, 0
        self._before, self._after = 0.0, 0.0  # squared errors; sums, since there are thousands of experts

    def add(self, stack: Sequence[int], errors: Sequence[WeightError]) -> None:
        """Count the weights of a stack, of which some may have been finished by an earlier run."""
        for number, error in zip(stack, errors, strict=True):
            spec = self._run.weights[number]
            num_bytes = math.prod(spec.shape) * self._run.checkpoint.dtype_of(spec).itemsize
            self._new += 0 if self._done.issuperset(stack) else num_bytes
            self._bytes += num_bytes
            self._finished += 1
            self._before += error.before.frobenius**2
            self._after += error.after.frobenius**2
            self.tell("")

    def tell(self, more: str) -> None:
        """Show how far the run is, with words on what it does now."""
        what = f"{self._finished}/{len(self._run.weights)} weights"
        change = error_change(self._before, self._after) if self._finished else ""
        self._show(
            Progress(
                self._bytes,
                self._new,
                self._run.sizes.source,
                f"{what}, {more}" if more else what,
                ("MB/s", 1e6),
                change,
            )
        )


def check_source_files(run: QuantizeRun, folder: OutputFolder) -> None:
    """Compare the files of the 16-bit model with those that the run began with.

    Files with other times are the same ones if the finished weights, and the tensors that were copied, are.

    Raises:
        BadInput: they are not; the sentence names files and tensors.
    """
    copied = {place_of(file): file_digest(file) for file in run.checkpoint.other_files}
    known = folder.source_files
    before = known.get("copied", copied)
    changed = sorted(name for name in {*before, *copied} if before.get(name) != copied.get(name))
    if changed_files(known.get("files"), run.checkpoint.stamps):
        done = [number for number in range(len(run.weights)) if folder.is_done(number)]
        changed += [run.weights[number].name for number in done if _is_changed(run, folder, number)]
        for shard in run.shards:
            if shard.copied and (run.out / shard.file).is_file():
                written = read_header(run.out / shard.file).tensors
                now = {name: digest_of(run.checkpoint.read(name)) for name in shard.copied}
                changed += [name for name in now if now[name] != written[name].digest]
    if changed:
        raise BadInput(
            f"{run.checkpoint.name} changed after {run.out} was begun: {listing(changed)} are different now; restore "
            f"the files, or {ANOTHER_FOLDER}"
        )
    folder.keep_source_files(run.checkpoint.stamps, copied)


def _is_changed(run: QuantizeRun, folder: OutputFolder, number: int) -> bool:
    """Return whether a finished weight was made of other values than there are now."""
    return folder.source_digest(number) not in ("", digest_of(run.checkpoint.read_weight(run.weights[number])))


def drop_damaged(run: QuantizeRun, folder: OutputFolder) -> None:
    """Remove finished shards that were damaged since, and split their weights again."""
    for shard in run.shards:
        path = run.out / shard.file
        if path.is_file() and not is_whole(path):
            folder.forget(shard.weights)
            path.unlink()


def split_stack(
    run: QuantizeRun,
    stack: Sequence[int],
    tensors: Iterator[list[Tensor]],
    writer: BackgroundWriter,
    times: Stopwatch,
    walk: BlockWalk | None,
) -> list[WeightError]:
    """Split the next weights that are read, measure them, and pass them to the writer; return their errors."""
    specs = [run.weights[number] for number in stack]
    with times.waiting("calibrating"):
        objectives = [walk.objective(spec) if walk else run.objective(spec.module) for spec in specs]
    with times.waiting("reading"):
        weights = next(tensors)
    digests = [digest_of(weight) for weight in weights]
    splits, errors = run.split(specs, weights, objectives)
    if walk is not None:
        walk.take(specs[0], splits[0].dense)
    for number, spec, split, error, source in zip(stack, specs, splits, errors, digests, strict=True):
        if not writer.folder.is_done(number):
            named, record = tensors_of(run, spec, split), to_record(error)
            with times.waiting("writing"):
                writer.save(number, *named, record, source)
    return errors
