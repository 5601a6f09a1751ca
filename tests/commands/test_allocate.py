"""`qsvd allocate`: from a checkpoint and a budget to a table, and what it says when it cannot."""

import ctypes
import dataclasses
import json
import re
import signal
from functools import cache

import pytest
import scipy.optimize
import torch

import qsvd
import qsvd.prepare.allocate
from qsvd.cli import run
from qsvd.decompose.alternate import Recipe, split_weight
from qsvd.decompose.candidates import measure_candidates
from qsvd.decompose.objective import fisher
from qsvd.files.source import Checkpoint, open_checkpoint
from qsvd.files.statistics import write_statistics
from qsvd.memory.items import Limits
from qsvd.options import Allocate
from qsvd.plan.allocation import from_text
from qsvd.plan.grid import grid_of
from qsvd.plan.weights import plan_model
from qsvd.prepare.allocate import importances, measure_and_solve, prepare_allocate
from tests.checkpoints import write_checkpoint
from tests.commands.calibrations import texts
from tests.commands.measurements import remembered, remembering
from tests.stops import StopAfter, Stopped

WIDE = {"hidden_size": 64, "intermediate_size": 128}
FAST = ("--codecs", "nf2-16-2x64", "nf3-16-3x64", "nf4-16-4x64", "--ranks", "0", "1", "4", "--device", "cpu")


@pytest.fixture(scope="module", autouse=True)
def _measured_once():
    with remembering():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, **WIDE)
    return folder


@pytest.fixture(scope="module")
def weights(model):
    return plan_model(open_checkpoint(str(model)).config).weights


@pytest.fixture
def allocate(model, tmp_path, monkeypatch, capfd):
    """Run the command in tmp_path; its exit code, stdout and stderr, what compiled libraries print included."""
    monkeypatch.chdir(tmp_path)

    def command(*flags, model=model, budget="3bits", out="table.txt"):
        code = run(["allocate", str(model), "--budget", budget, "--out", out, *FAST, *map(str, flags)])
        shown = capfd.readouterr()
        return code, shown.out, shown.err

    return command


def counted(monkeypatch):
    """Weights that are measured from now on."""
    shapes = []

    def counting(weight_OI, *arguments, **options):
        shapes.append(tuple(weight_OI.shape))
        return remembered(weight_OI, *arguments, **options)

    monkeypatch.setattr(qsvd.prepare.allocate, "measure_candidates", counting)
    return shapes


def taken(table, weights):
    """Bytes of a table by hand: codes, nested scales, factors of 16 bits."""
    total = 0
    for spec in weights:
        choice = table.choices[spec.module]
        numbers = spec.shape[0] * spec.shape[1]
        blocks = -(-numbers // 16)
        nested = {2: 2, 3: 3, 4: 4}[choice.codec.bits]
        scales = -(-blocks * nested // 8) + 4 * -(-blocks // 64) + 4
        total += numbers * choice.codec.bits // 8 + scales + 2 * choice.rank * sum(spec.shape)
    return total


def test_the_table_fits_the_budget_and_the_errors_are_those_of_the_splits(allocate, model, weights, tmp_path):
    code, out, _ = allocate("--budget", "3.4bits")
    assert code == 0
    text = (tmp_path / "table.txt").read_text()
    table = from_text(text, weights, "table.txt")
    numbers = sum(spec.shape[0] * spec.shape[1] for spec in weights)
    used = taken(table, weights)
    assert 0.98 * 3.4 * numbers / 8 < used <= 3.4 * numbers / 8
    assert f"used: {used:,} of {int(3.4 * numbers / 8):,} bytes" in out
    assert f"bits per element: {8 * used / numbers:.3f} with components" in " ".join(out.split())
    checkpoint = open_checkpoint(str(model))
    assert {f"model: {model}", f"source: {checkpoint.fingerprint}"} <= {*table.remarks}
    assert "allocator: both, objective: relative" in table.remarks
    for line in text.splitlines():
        module, *_, expected = line.split()
        if module in table.choices:
            choice = table.choices[module]
            weight = checkpoint.read(f"{module}.weight").float()
            split = split_weight(weight, Recipe(codec=choice.codec, rank=choice.rank))
            real = min(split.history) / weight.norm().item()
            assert float(expected) == pytest.approx(real, rel=0.05, abs=1e-4)


def test_the_summary_shows_roles_and_choices(allocate):
    _, out, err = allocate()
    roles = [line.split()[0] for line in out.splitlines() if re.match(r"\w+ +\d", line)]
    assert {"q", "k", "v", "o", "gate", "up", "down", "all"} <= {*roles}
    counts = re.findall(r"^(nf\d-\S+) +(\d+) +(\d+) +([\d.]+) *$", out, flags=re.M)
    assert sum(int(count) for _, _, count, _ in counts) == 14
    assert sum(float(share) for *_, share in counts) == pytest.approx(100, abs=0.5)
    assert "14/14 weights measured" in err
    assert out.endswith("\ntable.txt\n")


def test_another_budget_or_allocator_measures_nothing_again(allocate, weights, tmp_path, monkeypatch):
    shapes = counted(monkeypatch)
    tables = {}
    for flags in (
        ("both", "3bits"),
        ("both", "2.5bits"),
        ("uniform", "3bits"),
        ("sara", "3bits"),
        ("prilora", "3bits"),
    ):
        code, _, _ = allocate("--allocator", flags[0], budget=flags[1])
        assert code == 0
        tables[flags] = from_text((tmp_path / "table.txt").read_text(), weights, "")
    assert len(shapes) == 14
    assert allocate("--allocator", "bits", "--rank", "4", budget="4bits")[0] == 0
    assert len(shapes) == 14, "rank 4 is one of --ranks"
    assert allocate("--allocator", "bits", "--rank", "3", budget="4bits")[0] == 0
    assert len(shapes) == 28, "rank 3 is not"
    assert allocate(budget="3bits")[0] == 0
    assert len(shapes) == 28
    choices = [[*table.choices.values()] for table in tables.values()]
    assert all(one != other for place, one in enumerate(choices) for other in choices[:place])
    assert len({*choices[2]}) == 1
    assert all(len({choice.codec for choice in some}) == 1 for some in choices[3:])


def test_what_the_solver_prints_by_itself_does_not_stand_in_the_output(allocate, monkeypatch):
    def noisy(*arguments, **options):
        ctypes.CDLL(None).puts(b"a line for programmers")
        called.append(arguments)
        return milp(*arguments, **options)

    called, milp = [], scipy.optimize.milp
    monkeypatch.setattr(scipy.optimize, "milp", noisy)
    code, out, _ = allocate()
    assert code == 0
    assert "by layer type" in out
    assert called
    assert "a line for programmers" not in out


def test_bits_gives_every_weight_its_rank(allocate, weights, tmp_path):
    code, _, _ = allocate("--allocator", "bits", "--rank", "2", budget="4.5bits")
    assert code == 0
    table = from_text((tmp_path / "table.txt").read_text(), weights, "")
    assert {choice.rank for choice in table.choices.values()} == {2}
    assert len({choice.codec for choice in table.choices.values()}) > 1


def test_an_interrupted_run_goes_on_to_the_same_files(allocate, tmp_path, monkeypatch):
    assert allocate()[0] == 0
    whole = {name: (tmp_path / name).read_bytes() for name in ("table.txt", "table.txt.costs.jsonl")}
    for name in whole:
        (tmp_path / name).unlink()
    measured = []

    def interrupted(*arguments, **options):
        measured.append(1)
        if len(measured) == 5:
            signal.raise_signal(signal.SIGINT)
        return measure_candidates(*arguments, **options)

    monkeypatch.setattr(qsvd.prepare.allocate, "measure_candidates", interrupted)
    code, out, err = allocate()
    assert code == 130
    assert out == ""
    assert err.endswith(
        "interrupted; measured weights are kept in table.txt.costs.jsonl, the same command continues there\n"
    )
    assert len(measured) == 5
    assert not (tmp_path / "table.txt").exists()
    shapes = counted(monkeypatch)
    assert allocate()[0] == 0
    assert len(shapes) == 14 - 5
    assert {name: (tmp_path / name).read_bytes() for name in whole} == whole


def test_a_killed_run_loses_only_the_line_it_was_writing(allocate, tmp_path, monkeypatch):
    allocate()
    costs = tmp_path / "table.txt.costs.jsonl"
    whole, table = costs.read_bytes(), (tmp_path / "table.txt").read_bytes()
    costs.write_bytes(whole[:-20])
    shapes = counted(monkeypatch)
    assert allocate()[0] == 0
    assert len(shapes) == 1
    assert costs.read_bytes() == whole
    assert (tmp_path / "table.txt").read_bytes() == table


def test_a_weight_that_was_left_out_is_measured_when_it_comes_back(allocate, monkeypatch):
    allocate("--exclude", "*.down_proj")
    shapes = counted(monkeypatch)
    assert allocate()[0] == 0
    assert shapes == [(64, 128)] * 2


@pytest.mark.parametrize("flags", [("--seed", "1"), ("--dtype", "float16"), ("--ranks", "0", "2")])
def test_measurements_with_other_options_are_refused(allocate, flags):
    allocate()
    code, _, err = allocate(*flags)
    assert code == 2
    name = flags[0].removeprefix("--")
    assert re.search(rf"table.txt.costs.jsonl was written with other options: {name} .* there, .* now; give", err)


def test_every_weight_draws_from_a_seed_of_its_own_whatever_came_before_it(allocate, monkeypatch):
    seeds = []

    def noting(*arguments, seed, **options):
        seeds.append(seed)
        return remembered(*arguments, seed=seed, **options)

    monkeypatch.setattr(qsvd.prepare.allocate, "measure_candidates", noting)
    allocate()
    whole = [*seeds]
    assert len({*whole}) == 14
    allocate("--exclude", "*.q_proj", out="fewer.txt")
    fewer = seeds[14:]
    assert fewer == [seed for number, seed in enumerate(whole) if number % 7 != 0]
    allocate("--seed", "1", out="other.txt")
    assert not {*whole} & {*seeds[14 + 12 :]}


def test_measurements_of_another_model_are_refused(allocate, tmp_path):
    write_checkpoint(tmp_path / "other", seed=1, **WIDE)
    allocate()
    (tmp_path / "table.txt").unlink()
    code, _, err = allocate(model=tmp_path / "other")
    assert code == 2
    assert "other options: the 16-bit model changed" in err


def test_a_file_that_is_no_unedited_table_of_the_model_is_not_replaced(allocate, tmp_path):
    table = tmp_path / "table.txt"
    (tmp_path / "folder").mkdir()
    assert "--out folder is a folder; give a file, such as folder/allocation.txt" in allocate(out="folder")[2]
    table.write_text("my notes")
    assert allocate()[2] == ("qsvd: --out table.txt exists and is not a table of qsvd allocate; give another name\n")
    table.unlink()
    allocate()
    written = table.read_text()
    for edited in (written.replace(" 0 ", " 1 ", 1), written.replace("nf3", "nf2", 1), written + "# a note\n"):
        table.write_text(edited)
        code, _, err = allocate()
        assert (code, err) == (2, "qsvd: --out table.txt was edited by hand; give another name, or move it away\n")
        assert table.read_text() == edited
    table.write_text(written)
    write_checkpoint(tmp_path / "other", seed=1, **WIDE)
    code, _, err = allocate(model=tmp_path / "other")
    assert (code, err) == (2, "qsvd: --out table.txt is the table of another model; give another name\n")
    assert allocate(budget="2.5bits")[0] == 0
    assert table.read_text() != written


@pytest.fixture
def statistics(model, weights, tmp_path):
    """Write made-up statistics; their path."""

    def write(name="stats.safetensors", *, fingerprint=None, traces=True, least=0.5, modules=None):
        draw = torch.Generator().manual_seed(0)
        tensors = {}
        for number, spec in enumerate(weights if modules is None else weights[:modules]):
            for side, size in zip(("rows", "columns"), spec.shape, strict=True):
                tensors[f"{spec.module}.{side}"] = torch.rand(size, generator=draw) + 0.01
            if traces:
                tensors[f"{spec.module}.trace"] = torch.tensor([least + 4.0**number])
                tensors[f"{spec.module}.trace_error"] = torch.zeros(1)
        fingerprint = fingerprint or open_checkpoint(str(model)).fingerprint
        write_statistics(tmp_path / name, tensors, fingerprint=fingerprint, record={"model": "a model"})
        return tmp_path / name

    return write


def test_fisher_weights_rows_and_columns(allocate, model, weights, tmp_path, statistics):
    path = statistics()
    code, _, _ = allocate("--objective", "fisher", "--statistics", path, budget="3.2bits")
    assert code == 0
    lines = (tmp_path / "table.txt.costs.jsonl").read_text().splitlines()[1:]
    spec, record = weights[3], json.loads(lines[3])
    assert record["module"] == spec.module
    checkpoint = open_checkpoint(str(model))
    weight = checkpoint.read(spec.name).double()
    draw = torch.Generator().manual_seed(0)
    for other in weights[: weights.index(spec) + 1]:  # the same draws again
        rows, columns = (torch.rand(size, generator=draw) + 0.01 for size in other.shape)
    weighted = weight.square() * rows[:, None].double() * columns.double() / rows.double().mean()
    assert record["norm"] == pytest.approx(weighted.sum().item(), rel=1e-5)
    table = from_text((tmp_path / "table.txt").read_text(), weights, "")
    choice = table.choices[spec.module]
    split = split_weight(weight.float(), Recipe(codec=choice.codec, rank=choice.rank), objective=fisher(rows, columns))
    shown = next(line.split()[-1] for line in (tmp_path / "table.txt").read_text().splitlines() if spec.module in line)
    assert float(shown) == pytest.approx(min(split.history) / record["norm"] ** 0.5, rel=0.05)


def test_the_hessian_weights_whole_matrices_on_plain_measurements(allocate, weights, tmp_path, statistics, monkeypatch):
    allocate(budget="2.9bits")
    plain = from_text((tmp_path / "table.txt").read_text(), weights, "")
    shapes = counted(monkeypatch)
    code, out, _ = allocate("--objective", "hessian", "--statistics", statistics(), budget="2.9bits")
    assert code == 0
    assert shapes == []
    moved = from_text((tmp_path / "table.txt").read_text(), weights, "")
    bits = [[table.choices[s.module].codec.bits for s in weights] for table in (plain, moved)]
    assert bits[1][0] < bits[0][0] or bits[1][1] < bits[0][1]  # traces grow from weight to weight
    assert bits[1][-1] > bits[0][-1]
    assert "not above zero" not in out


def test_the_importance_of_a_weight_is_the_mean_of_its_trace_and_never_negative(model, weights, tmp_path, statistics):
    options = Allocate(str(model), "3bits", tmp_path / "t", objective="hessian", statistics=statistics(least=-5.0))
    found, _ = importances(prepare_allocate(options))
    numbers = [spec.shape[0] * spec.shape[1] for spec in weights]
    means = [(4.0**number - 5.0) / numbers[number] for number in range(14)]  # the first two are below zero
    assert [*found.values()] == pytest.approx([min(means[2:])] * 2 + means[2:])
    assert [*found] == [spec.module for spec in weights]


def test_measurements_by_other_statistics_are_refused(allocate, statistics):
    allocate("--objective", "fisher", "--statistics", statistics(), budget="3.2bits")
    code, _, err = allocate("--objective", "fisher", "--statistics", statistics("other", least=1.0), budget="3.2bits")
    assert code == 2
    assert "was written with other options: statistics " in err


def test_damage_in_a_part_of_the_statistics_that_the_objective_does_not_read_is_named(allocate, weights, statistics):
    path, name = statistics(), f"{weights[3].module}.trace"
    content = bytearray(path.read_bytes())
    data = 8 + int.from_bytes(content[:8], "little")
    content[data + json.loads(content[8:data])[name]["data_offsets"][0]] ^= 1
    path.write_bytes(content)
    code, _, err = allocate("--objective", "fisher", "--statistics", path, budget="3.2bits")
    assert (code, f"{path} is damaged at {name}" in err) == (1, True), err


def test_traces_that_are_not_above_zero_count_as_the_least_that_is(allocate, tmp_path, statistics):
    allocate("--objective", "hessian", "--statistics", statistics(least=-5.0), budget="2.9bits")
    assert "# traces: 2 of 14 are not above zero and count as the least that is" in (tmp_path / "table.txt").read_text()
    code, _, err = allocate("--objective", "hessian", "--statistics", statistics(least=-1e9))
    assert code == 2
    assert err.endswith("has no trace above zero; run qsvd calibrate with more --traces\n")


@pytest.fixture
def unread(monkeypatch):
    """No weight may be read."""

    def fail(_checkpoint, name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(Checkpoint, "read", fail)


LEAST = "--budget {} is too small: with their smallest codecs and {}, the 14 weights need {}; give "
BAD = {
    "too small": (
        "--budget 2bits",
        LEAST.format("2bits", "ranks", "2.163bits") + "at least that, or smaller --codecs or --ranks",
    ),
    "too small in bytes": ("--budget 19KB", LEAST.format("19KB", "ranks", "19.928KB") + "at least that"),
    "too small at a rank": (
        "--budget 4bits --allocator bits",
        LEAST.format("4bits", "rank 64", "27.941bits") + "a lower --rank, or --allocator both",
    ),
    "above 16 bits": ("--budget 17bits", "--budget 17bits is above 16 bits a number (16.000bits)"),
    "no unit": ("--budget 3", "--budget '3' is not a budget: give bits per number"),
    "an unknown codec": ("--codecs nf3-64", "--codecs: codec 'nf3-64' is unknown; a codec is nf4 or nf4"),
    "ranks above all sides": ("--ranks 4 65", "--ranks 65 are outside 0..64, the ranks of the largest weights"),
    "a negative rank": ("--rank=-1", "--rank -1 is negative; 0 means no components"),
    "a negative gap": ("--gap=-1", "--gap -1.0 is below 0"),
    "no time": ("--time-limit 0", "--time-limit 0.0 is not above 0"),
    "no statistics": ("--objective fisher", "--objective fisher needs --statistics FILE, which qsvd calibrate writes"),
    "statistics for nothing": ("--statistics x", "--statistics is for --objective fisher or hessian, and --obj"),
    "no such statistics": ("--objective hessian --statistics x", "x does not exist; qsvd calibrate MODEL DATA --out x"),
    "a pattern that matches nothing": ("--include *.query", "no linear layer in the blocks matches '*.query'"),
    "a device": ("--device tpu", "--device 'tpu' is not one of auto, cpu, cuda, cuda:N"),
}


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_sentence_before_a_weight_is_read(allocate, tmp_path, kind):
    flags, sentence = BAD[kind]
    code, out, err = allocate(*flags.split())
    assert (code, out) == (2, "")
    assert err.startswith(f"qsvd: {sentence}")
    assert err.count("\n") == 1
    assert [*tmp_path.iterdir()] == []


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("objective", ["fisher", "hessian"])
def test_statistics_that_do_not_fit_are_refused_before_a_weight_is_read(allocate, statistics, objective):
    for path, sentence in (
        (statistics("other", fingerprint="0" * 64), "other has the statistics of another model"),
        (statistics("few", modules=5), "few lacks 9 of 14 weights"),
    ):
        code, _, err = allocate("--objective", objective, "--statistics", path)
        assert code == 2
        assert sentence in err


@pytest.mark.usefixtures("unread")
def test_the_hessian_needs_traces(allocate, statistics):
    code, _, err = allocate("--objective", "hessian", "--statistics", statistics(traces=False))
    assert code == 2
    assert "has no traces of the Hessian; run qsvd calibrate again with --traces" in err


@pytest.mark.usefixtures("unread")
def test_a_model_without_a_place_in_memory_is_refused(allocate, monkeypatch):
    real = qsvd.prepare.allocate.machine
    monkeypatch.setattr(
        qsvd.prepare.allocate,
        "machine",
        lambda *arguments: dataclasses.replace(real(*arguments), limits=Limits(host=1000)),
    )
    code, _, err = allocate()
    assert code == 3
    assert re.search(r"gate_proj.weight \[128, 64\] needs about 0.0 GB on cpu to be measured, and 0.0 GB are free", err)


def test_a_weight_that_is_not_finite_is_named(allocate, tmp_path):
    made = write_checkpoint(tmp_path / "broken", **WIDE)
    made.model.layers[1].self_attn.q_proj.weight.data[3, 5:7] = float("nan")
    made.save_pretrained(tmp_path / "broken")
    code, _, err = allocate(model=tmp_path / "broken")
    assert code == 2
    assert "model.layers.1.self_attn.q_proj.weight" in err


def test_training_bytes_buy_fewer_components(allocate, weights, tmp_path):
    ranks = {}
    for count in ("stored", "training"):
        assert allocate("--count", count, budget="6bits")[0] == 0
        table = from_text((tmp_path / "table.txt").read_text(), weights, "")
        ranks[count] = sum(choice.rank for choice in table.choices.values())
    assert ranks["training"] < ranks["stored"]
    assert "budget: 6bits in memory while the components are trained" in (tmp_path / "table.txt").read_text()


def test_another_command_can_ask_for_an_allocation_and_stop_it(model, weights, tmp_path, monkeypatch):
    options = Allocate(
        str(model), "3bits", tmp_path / "new" / "table.txt", codecs=FAST[1:4], ranks=(0, 1), device="cpu"
    )
    checkpoint = open_checkpoint(str(model))
    with pytest.raises(Stopped):
        measure_and_solve(prepare_allocate(options, checkpoint), StopAfter(3))
    shapes, show = counted(monkeypatch), StopAfter()
    found = measure_and_solve(prepare_allocate(options, checkpoint), show).allocation
    assert len(shapes) == len(show.seen) == 11
    assert show.seen[-1].done == show.seen[-1].total
    assert [*found.choices] == [spec.module for spec in weights]
    assert [path.name for path in options.out.parent.iterdir()] == ["table.txt.costs.jsonl"]


def test_on_a_trained_model_bits_and_ranks_are_no_worse_than_bits_and_those_than_one_codec(allocate, stories, tmp_path):
    checkpoint = open_checkpoint(str(stories))
    weights = [spec for spec in plan_model(checkpoint.config).weights if spec.module.startswith("model.layers.0.")]
    read = {spec.module: checkpoint.read(spec.name).float() for spec in weights}
    codecs = ("--codecs", "nf2-16-2x64", "nf3-16-3x64", "nf4-16-4x64", "--ranks", "0", "1", "2", "--rank", "0")
    codecs += ("--objective", "frobenius", "--include", "*.layers.0.*")
    real, error = {}, cache(lambda module, codec, rank: min(split_weight(read[module], Recipe(codec, rank)).history))
    for allocator in ("both", "bits", "uniform"):
        for budget in ("2.5bits", "3.25bits", "4bits"):
            code, out, _ = allocate("--allocator", allocator, *codecs, model=stories, budget=budget)
            assert code == 0
            assert "Highs" not in out
            table = from_text((tmp_path / "table.txt").read_text(), weights, "")
            real[allocator, budget] = sum(error(m, c.codec, c.rank) ** 2 for m, c in table.choices.items())
    for budget in ("2.5bits", "3.25bits", "4bits"):
        assert real["both", budget] <= 1.001 * real["bits", budget]
        assert real["bits", budget] < 0.9 * real["uniform", budget]


def test_with_texts_the_choices_are_those_of_quantize_with_a_budget(stories, tmp_path, monkeypatch):
    shared = {"calibrate": str(texts()), "examples": 3, "max_length": 32, "seed": 3}
    few = ("nf2-16-2x64", "nf4-16-4x64"), (0, 4)  # for both commands
    monkeypatch.setattr(qsvd.prepare.allocate, "grid_of", lambda _, __, *rest: grid_of(*few, *rest))
    shared |= {"include": ("*.[01].self_attn.k_proj",), "budget": "3.5bits", "device": "cpu"}
    found = qsvd.allocate(stories, out=tmp_path / "table.txt", **shared)
    qsvd.quantize(stories, out=tmp_path / "out", **shared)
    chosen, of_quantize = ((tmp_path / name).read_text().splitlines() for name in ("table.txt", "out/allocation.txt"))
    assert chosen == of_quantize, "the expected errors, too"
    errors = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()]
    assert {one["name"]: one["rank"] for one in errors} == {m: c.rank for m, c in found.allocation.choices.items()}
    shapes = counted(monkeypatch)
    qsvd.allocate(stories, out=tmp_path / "table.txt", **shared | {"budget": "3bits"})
    assert not shapes, "another budget uses the same measurements"
    for changed in ({"examples": 2}, {"sensitivity": "inputs"}):
        with pytest.raises(ValueError, match=r"costs\.jsonl"):
            qsvd.allocate(stories, out=tmp_path / "table.txt", **shared | changed)


def test_options_of_texts_need_texts(allocate):
    code, _, err = allocate("--sensitivity", "both", "--max-length", "9")
    assert code == 2
    assert "--sensitivity needs --calibrate DATA; --max-length needs --calibrate DATA" in " ".join(err.split())
