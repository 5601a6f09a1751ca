"""`qsvd compare`: the same table however it is run; rates, seeds and tests by definition; budgets by hand counts."""

import json
import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch

import qsvd
from qsvd.cli import run
from qsvd.commands import compare as command
from qsvd.training.cells import Cells
from tests.commands.folders import files_of
from tests.runs import TEXTS, labelled_rows, write_rows
from tests.stops import killed

SAME = ("results.jsonl", "table.md", "quality.svg", "rates.svg")
SHORT = {"steps": 2, "batch_size": 2, "accumulate": 1, "max_length": 16, "device": "cpu"}
ROWS = {"methods": ("lora", "pissa"), "size": 4, "rates": (1e-3, 1e-2), "seeds": 2}


@pytest.fixture(scope="module")
def here(tmp_path_factory, language):
    """The model in M and the data in D."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "M").symlink_to(language.parent / "source")
    (folder / "D").mkdir()
    for number, part in enumerate(("train", "valid", "test")):
        write_rows(folder / "D" / f"{part}.jsonl", [{"text": text} for text in TEXTS[4 * number : 4 * number + 4]])
    return folder


def compared(here, name, **changes):
    return qsvd.compare(here / "M", here / "D", out=here / name, **(SHORT | ROWS | changes))


@pytest.fixture(scope="module")
def first(here):
    """A comparison that nothing has stopped."""
    return compared(here, "first")


@pytest.fixture
def _no_plots(monkeypatch):
    """For who looks at numbers alone."""
    monkeypatch.setattr(command, "PLOTS", {})


def contents(folder):
    return {name: Path(folder / name).read_bytes() for name in SAME}


def lines(folder, kind="row"):
    records = [json.loads(line) for line in Path(folder / "results.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def test_a_finished_comparison_trains_nothing(here, first, monkeypatch):
    before = contents(first.path)
    monkeypatch.setattr(command.CellTrainer, "train", None)
    assert compared(here, "first").rows == first.rows
    assert contents(first.path) == before
    assert not any((first / "runs").iterdir())
    assert {name.rpartition(".")[2] for name in files_of(first / "cells")} == {"json"}


FEWER = {"methods": ("lora",), "seeds": 1, "keep_runs": True}  # the first row, with the first of its seeds


@pytest.mark.usefixtures("_no_plots")
def test_a_comparison_that_is_killed_goes_on_to_the_same_results_and_keeps_its_runs(here, first, monkeypatch):
    def times(suffix=".json"):
        return {one.name: one.stat().st_mtime_ns for one in (here / "killed" / "cells").glob(f"*{suffix}")}

    shutil.copytree(first / "splits", here / "killed" / "splits")
    killed(monkeypatch, Cells, "finish", 2, lambda: compared(here, "killed", **FEWER))
    before = times()
    assert len(before) == 1
    killed(monkeypatch, Cells, "finish_test", 1, lambda: compared(here, "killed", **FEWER))
    assert before.items() < times().items()
    before = times()
    found = compared(here, "killed", **FEWER)
    (row,), expected = found.rows, first.rows[0]
    assert (row.rates, row.best_rate) == (expected.rates, expected.best_rate)
    assert (row.trained_parameters, row.seeds) == (expected.trained_parameters, expected.seeds[:1])
    assert before.items() <= times("").items()
    summaries = [json.loads((one / "summary.json").read_text()) for one in (found / "runs").iterdir()]
    assert sorted(one["held_out_after"] for one in summaries) == sorted(one.valid_loss for one in row.rates)


@pytest.mark.usefixtures("_no_plots")
def test_two_processes_share_the_cells_and_end_with_the_same_results(here, first):
    fork = multiprocessing.get_context("fork")
    trained, both = fork.SimpleQueue(), fork.Barrier(2)

    def work(number):
        finish, cells = Cells.finish, []

        def told(self, cell, *rest):
            if not cells:
                both.wait(timeout=600)  # until the other one has a cell too
            cells.append(cell)
            finish(self, cell, *rest)
            trained.put((number, cell.file))

        Cells.finish = told
        torch.set_num_threads(torch.get_num_threads())  # else threads of the work make torch's pool anew, at once
        compared(here, "shared", methods=("lora",))

    processes = [fork.Process(target=work, args=(number,)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=600)
    assert [process.exitcode for process in processes] == [0, 0]
    (row,) = compared(here, "shared", methods=("lora",)).rows
    assert (row.rates, row.seeds) == (first.rows[0].rates, first.rows[0].seeds)
    found = []
    while not trained.empty():
        found.append(trained.get())
    assert len({file for _, file in found}) == len(found) == 3
    assert {number for number, _ in found} == {0, 1}


def test_a_cell_has_the_numbers_of_qsvd_train(here, first, tmp_path):
    """Of the test part, which is given as validation data; kept runs have those of the other one."""
    (row, _) = lines(first.path)
    split = next((first / "splits").glob("r0-*"))
    seed, valid = row["seeds"][1], here / "D" / "test.jsonl"
    chosen = {"method": "lora", "rank": 4, "learning_rate": row["best_rate"], "seed": seed["seed"]}
    made = qsvd.train(split, here / "D" / "train.jsonl", out=tmp_path / "run", valid=valid, **SHORT, **chosen)
    assert made.summary.held_out_after == seed["test_loss"]
    assert row["trained_parameters"] == made.summary.trained_parameters


def test_only_the_best_rate_of_each_row_is_tested(first):
    for row in lines(first.path):
        losses = {one["learning_rate"]: one["valid_loss"] for one in row["rates"]}
        assert row["best_rate"] == min(losses, key=losses.get)
        assert [seed["seed"] for seed in row["seeds"]] == [0, 1]
        assert row["seeds"][0]["valid_loss"] == losses[row["best_rate"]]
    tested = [name for name in files_of(first / "cells") if name.endswith(".test.json")]
    assert len(tested) == 4


def test_a_row_without_its_own_sweep_is_marked_everywhere_and_a_run_that_diverges_counts_as_such(here, first):
    methods = ("lora", "lora --learning-rate 3e-3")
    shutil.copytree(first / "splits", here / "marked" / "splits")
    found = compared(here, "marked", methods=methods, rates=(1e-3, 1e30), seeds=1)
    assert [row.is_tuned for row in found.rows] == [False, False]  # two rates have no middle
    assert lines(found.path)[1]["note"] == "not tuned"
    assert "lora --learning-rate 3e-3 (**not tuned**)" in (found / "table.md").read_text()
    for name in ("quality.svg", "rates.svg"):
        assert "rank 0 (not tuned) -->" in (found / name).read_text()  # the label, as matplotlib's comment has it
    diverged = found.rows[0]
    assert diverged.best_rate == 1e-3
    assert diverged.rates[1].valid_loss is None
    assert "NaN or infinite" in diverged.rates[1].stopped
    assert "1e+30: diverged" in (found / "table.md").read_text()


@pytest.mark.usefixtures("_no_plots")
def test_a_sweep_grows_until_its_best_rate_is_between_two_others(here, first):
    shutil.copytree(first / "splits", here / "grown" / "splits")
    (row,) = compared(here, "grown", methods=("lora --alpha 16",), rates=(), seeds=1).rows
    tried = [one.learning_rate for one in row.rates]
    assert len(tried) >= 5
    assert {3e-4, 1e-3, 3e-3, 1e-2, 3e-2} <= {*tried}  # around ten times 2e-4
    assert tried[0] < row.best_rate < tried[-1]
    assert row.is_tuned


@pytest.mark.usefixtures("_no_plots")
def test_a_classifier_has_accuracies_and_a_file_is_divided(bert, tmp_path):
    write_rows(tmp_path / "d.jsonl", labelled_rows(14))
    chosen = {"methods": ("lora",), "size": 2, "rates": (1e-3,), "seeds": 1}
    found = qsvd.compare(bert.parent / "source", tmp_path / "d.jsonl", out=tmp_path / "c", **SHORT, **chosen)
    (row,) = found.rows
    assert {seed.test_accuracy for seed in row.seeds} <= {0, 1 / 3, 2 / 3, 1}  # of three examples
    assert row.trained_parameters > row.adapter_parameters  # with the new head
    parts = [path.read_text().splitlines() for path in sorted((tmp_path / "c" / "data").rglob("*.jsonl"))]
    assert [len(part) for part in parts] == [3, 10, 1]  # test, train, valid
    assert sorted(line for part in parts for line in part) == sorted((tmp_path / "d.jsonl").read_text().splitlines())
    assert "test accuracy" in (found / "table.md").read_text()


def plan(here, capsys, *words):
    assert run(["compare", str(here / "M"), str(here / "D"), "--out", str(here / "no"), "--dry-run", *words]) == 0
    assert not (here / "no").exists()
    out = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out if line.startswith("|")][2:]
    return {row[0]: (row[1], row[2], *(int(cell.replace(",", "")) for cell in row[3:5])) for row in rows}, out


def test_equal_parameters_are_counted_by_hand(here, capsys):
    """LoRA and PiSSA train r (m + n) of each layer, DoRA also m, LoRA-XS r^2."""
    shapes = shapes_of(here)
    sides, rows = sum(m + n for m, n in shapes), sum(m for m, _ in shapes)
    limit = 20_000
    words = ("--equal", "parameters", "--size", "20k", "--methods", "lora", "pissa", "dora", "lora-xs")
    found, _ = plan(here, capsys, *words)
    rank = limit // sides
    assert found["lora"][:3] == ("--rank 0", str(rank), rank * sides)
    assert found["pissa"][:3] == (f"--rank {rank}", str(rank), rank * sides)
    of_dora = (limit - rows) // sides
    assert found["dora"][:3] == ("--rank 0", str(of_dora), of_dora * sides + rows)
    of_core = int((limit / len(shapes)) ** 0.5)
    assert found["lora-xs"][:3] == (f"--rank {of_core}", str(of_core), of_core**2 * len(shapes))


def test_equal_bytes_are_counted_by_hand(here, capsys):
    """NF4 with nested scales, everything else and all factors in 16 bits; trained components are there once."""
    shapes = shapes_of(here)
    residual = sum(m * n // 2 + m * n // 64 + 4 * -(-m * n // 64 // 256) + 4 for m, n in shapes)
    tensors = header(here / "M" / "model.safetensors")
    split = [name for name, shape in tensors.items() if "proj" in name]
    rest = sum(2 * product(shape) for name, shape in tensors.items() if name not in split)
    sides = sum(m + n for m, n in shapes)
    limit = residual + rest + 2 * 5 * sides + 100
    words = ("--equal", "bytes", "--size", f"{limit / 1e6:.6f}MB", "--methods", "lora", "pissa", "edora")
    found, _ = plan(here, capsys, *words)
    assert found["lora"][1:] == ("5", 5 * sides, residual + rest + 10 * sides)
    assert found["pissa"][0] == "--rank 5"
    assert found["pissa"][3] == found["lora"][3]
    rows = sum(m for m, _ in shapes)
    rank = int(found["edora"][1])
    sizes = [residual + rest + 2 * r * sides + 2 * (r * r * len(shapes) + rows) for r in (rank, rank + 1)]
    assert sizes[0] == found["edora"][3] <= limit < sizes[1]


def header(path):
    raw = path.read_bytes()
    found = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return {name: entry["shape"] for name, entry in found.items() if name != "__metadata__"}


def shapes_of(here):
    return [shape for name, shape in header(here / "M" / "model.safetensors").items() if "proj" in name]


def product(shape):
    total = 1
    for size in shape:
        total *= size
    return total


def test_all_lists_what_it_leaves_out_with_the_reason(here, capsys):
    found, out = plan(here, capsys, "--methods", "all", "--splits", "--rank 0", "--quality fast", "--size", "4")
    assert {"lora", "pissa"} <= found.keys()
    assert "lora-ga" not in found
    said = "\n".join(out)
    assert "Left out: pissa --rank 0: it trains the stored rank 0, and all rows have rank 4" in said
    assert "lora-ga needs --gradients FILE" in said


REFUSED = {
    "--methods 'lorra': 'lorra' is no method (did you mean lora?)": ["--methods", "lorra"],
    "--methods 'lora --rslor': qsvd train has no option --rslor (did you mean --rslora?)": [
        "--methods",
        "lora --rslor",
    ],
    "--methods 'lora --seed 3': leave out --seed, which all rows have in common": ["--methods", "lora --seed 3"],
    "--splits '--rnk 3': qsvd quantize has no option --rnk (did you mean --rank?)": ["--splits", "--rnk 3"],
    "--splits '--out O': leave out --out, which qsvd compare sets": ["--splits", "--out O"],
    "--size sixteen is not a rank": ["--size", "sixteen"],
    "--size 3 apples is not a number of parameters": ["--equal", "parameters", "--size", "3 apples"],
    "--seeds 0 is below 1": ["--seeds", "0"],
    "--rates (0.0,) has a number that is not finite and above 0": ["--rates", "0"],
    "--methods 'pissa --alpha 3'": ["--methods", "pissa --alpha 3"],
    "no row is left: lora (": ["--methods", "lora", "--equal", "parameters", "--size", "5"],
    "--methods 'lora-ga': lora-ga needs --gradients FILE": ["--methods", "lora-ga"],
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_bad_input_is_refused_before_any_work(here, capsys, sentence):
    words = ["compare", str(here / "M"), str(here / "D"), "--out", str(here / "never"), *REFUSED[sentence]]
    assert run(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert sentence in said.err
    assert len(said.err.splitlines()) == 1
    assert not (here / "never").exists()


def test_all_wrong_specs_are_named_at_once_and_a_folder_needs_three_parts(here, tmp_path, capsys):
    words = ["compare", str(here / "M"), str(here / "D"), "--out", str(tmp_path / "never")]
    assert run([*words, "--methods", "a", "lora --b", "--splits", "--c 1"]) == 2
    said = capsys.readouterr().err
    assert all(one in said for one in ("--methods 'a'", "--methods 'lora --b'", "--splits '--c 1'"))
    (tmp_path / "D").mkdir()
    write_rows(tmp_path / "D" / "train.jsonl", [{"text": "a"}])
    words[2] = str(tmp_path / "D")
    assert run(words) == 2
    assert f"{tmp_path / 'D'} has no file valid, test" in capsys.readouterr().err
