"""One cell of a comparison, trained and measured: the run of `qsvd train`, without its first measurement and files."""

import gc
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from qsvd.adapters.model import restore, trained
from qsvd.console.journal import explained_errors, held_out_loss
from qsvd.errors import Interrupted, TrainingStopped, listing
from qsvd.files.adapter import open_adapter
from qsvd.files.workspace import ADAPTER_RECORD
from qsvd.prepare.comparing.compare import CompareRun
from qsvd.prepare.train import TrainRun, load_start
from qsvd.training.cells import Cell, Cells, Result, Test
from qsvd.training.liger import use_liger
from qsvd.training.run_folder import Step
from qsvd.training.steps import TellSteps, peak_bytes_of
from qsvd.training.trainer import make_trainer

LIBRARIES = ("torch", "transformers", "trl", "bitsandbytes")
Keep = Callable[[TrainRun, Callable[[], bool], list[Step]], Any]


def runs_folder(run: CompareRun, cell: Cell) -> Path:
    """Return the folder of the run of a cell, which is removed when it is not needed any more."""
    return run.out / "runs" / cell.file


@dataclass(frozen=True)
class CellTrainer:
    """Trains the cells of a comparison and writes what was measured.

    Args:
        is_stop_asked: Is asked after every step.
        keep: Trains a run with all its files, and returns the model, for --keep-runs; its steps go into the list.
    """

    run: CompareRun
    cells: Cells
    is_stop_asked: Callable[[], bool]
    keep: Keep

    def train(self, first: TrainRun, cell: Cell, *, is_tested: bool) -> None:
        """Train one cell, and test it if it is to be tested.

        Without a test its adapter is kept, so that the best run of a sweep can be tested later. If that is lost, the
        run is repeated, to the same numbers.

        Args:
            first: A checked run of the same row.

        Raises:
            Interrupted: the run is not complete.
        """
        folder = runs_folder(self.run, cell)
        rate, seed = cell.key["learning_rate"], cell.key["seed"]
        here = replace(
            first,
            options=replace(first.options, out=folder, learning_rate=rate, seed=seed),
            settings=replace(first.settings, learning_rate=rate, seed=seed),
            record=replace(first.record, seed=seed),
        )
        if self.cells.result(cell) is not None and (folder / ADAPTER_RECORD).is_file():
            model = load_start(here, is_resumed=True)
            restore(model, open_adapter(folder))
            self.cells.finish_test(cell, self._tested(here, model))
        else:
            shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
            self._train(here, cell, is_tested=is_tested)
        if is_tested and not self.run.options.keep_runs:
            shutil.rmtree(folder, ignore_errors=True)
        gc.collect()

    def _train(self, here: TrainRun, cell: Cell, *, is_tested: bool) -> None:
        begun, busy, steps = time.monotonic(), time.process_time(), list[Step]()
        peak, test, is_kept = peak_bytes_of(here.device), None, self.run.options.keep_runs
        try:
            model = self.keep(here, self.is_stop_asked, steps) if is_kept else self._trained(here, steps, peak)
            if len(steps) < here.total_steps and self.is_stop_asked():
                raise interrupted(self.run)
            result = _measured(here, model, steps)
            if is_tested:
                test = self._tested(here, model)
            elif not is_kept:
                here.out.mkdir(parents=True, exist_ok=True)
                model.save_pretrained(here.out)
        except TrainingStopped as error:
            result = Result(stopped=str(error).replace(str(here.out), "RUN"), steps=len(steps))
        seconds = [after.seconds - before.seconds for before, after in pairwise(steps)]
        facts = {
            "threads": torch.get_num_threads(),
            "device": str(here.device),
            "seconds": round(time.monotonic() - begun, 3),
            "cpu_seconds": round(time.process_time() - busy, 3),
            "step_seconds": round(statistics.median(seconds), 4) if seconds else None,
            "peak_bytes": peak(),
            "versions": {name: version(name) for name in LIBRARIES},
        }
        if self.cells.result(cell) is None:
            self.cells.finish(cell, result, facts)
        if test is not None:
            self.cells.finish_test(cell, test)

    def _trained(self, run: TrainRun, steps: list[Step], peak: Callable[[], int]) -> Any:
        """Train as `qsvd train` does, and return the model."""

        def tell(step: Step) -> tuple[bool, bool]:
            steps.append(step)
            return False, self.is_stop_asked()

        torch.manual_seed(run.options.seed)
        with explained_errors(run):
            model = load_start(run, is_resumed=False)
            use_liger(model)
            settings = replace(run.settings, save_every=0)
            trainer = make_trainer(model, run.data.tokenizer, run.data.dataset, settings, run.out, run.split)
            begun = time.monotonic()
            trainer.add_callback(TellSteps(tell, lambda: time.monotonic() - begun, peak))
            trainer.train()
        wrong = [name for name, value in trained(model).items() if not value.isfinite().all()]
        if wrong:
            raise TrainingStopped(f"after the last step {len(wrong)} trained tensors are not finite: {listing(wrong)}")
        return model

    def _tested(self, here: TrainRun, model: Any) -> Test:
        """Measure a trained model on the part that tests."""
        test = replace(here, data=replace(here.data, held_out=self.run.test))
        found = held_out_loss(test, model, "after")
        loss = found["held_out_after"]
        assert loss is not None, "there is a test part"
        return Test(loss, found["accuracy_after"])


def _measured(here: TrainRun, model: Any, steps: list[Step]) -> Result:
    """Measure a trained model on the part that chooses the rate."""
    valid = held_out_loss(here, model, "after")
    return Result(
        steps=len(steps),
        trained_parameters=sum(parameter.numel() for parameter in trained(model).values()),
        valid_loss=valid["held_out_after"],
        valid_accuracy=valid["accuracy_after"],
        last_loss=steps[-1].loss,
    )


def interrupted(run: CompareRun) -> Interrupted:
    """Return what ends a comparison that the user stops."""
    return Interrupted(f"interrupted; finished cells are kept, the same command continues in {run.out}")
