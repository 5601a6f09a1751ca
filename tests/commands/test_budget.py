"""`qsvd quantize --budget`: what is on disk is within the budget, a stopped run goes on, bad budgets are refused."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch

import qsvd
import qsvd.prepare.allocate
from qsvd.cli import run
from qsvd.commands.quantize import quantize_run
from qsvd.decompose.candidates import measure_candidates
from qsvd.errors import DoesNotFit
from qsvd.files.source import open_checkpoint
from qsvd.files.statistics import write_statistics
from qsvd.prepare.quantize import prepare_quantize
from tests.checkpoints import write_checkpoint
from tests.commands.folders import components_of, files_of, tensors_of
from tests.commands.measurements import few_candidates, remembering
from tests.mixed import modules_of, residual
from tests.stops import StopAfter, Stopped

KEPT = (".safetensors", "allocation.txt", "config.json")


@pytest.fixture(scope="module", autouse=True)
def _measured_once():
    with remembering():
        yield


def few(monkeypatch):
    """Let three codecs at four ranks be tried: enough where it does not matter which."""
    few_candidates(monkeypatch, 0, 1, 2, 4, codecs=("nf2-32-3x64-fit", "nf3-64-4x64-fit", "nf4-64-4x64-fit"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    write_checkpoint(folder, hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_key_value_heads=4)
    return folder


@pytest.fixture(scope="module")
def statistics(source):
    """Moments in which some rows and columns matter a thousand times as much."""
    shapes = {name: t.shape for name, t in tensors_of(source).items() if name.endswith("_proj.weight")}
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (rows, columns) in shapes.items():
        module = name.removesuffix(".weight")
        tensors[f"{module}.rows"] = 10.0 ** (3 * torch.rand(rows, generator=generator))
        tensors[f"{module}.columns"] = 10.0 ** (3 * torch.rand(columns, generator=generator))
        tensors[f"{module}.columns"] *= tensors[f"{module}.rows"].mean() / tensors[f"{module}.columns"].mean()
    file = source / "statistics.safetensors"
    write_statistics(file, tensors, fingerprint=open_checkpoint(str(source)).fingerprint, record={"model": "tiny"})
    return file


def options(source, out, **changes):
    return qsvd.Quantize(str(source), out=out, **({"budget": "3bits", "iterations": 2} | changes))


def stored(out):
    """Bytes in the files of everything that belongs to a split weight, and numbers of these weights."""
    weights = json.loads((out / "qsvd.json").read_text())["weights"]
    modules = {weight["module"] for weight in weights.values()}
    held = sum(t.nbytes for name, t in tensors_of(out).items() if name.rpartition(".")[0] in modules)
    held += sum(t.nbytes for t in components_of(out).values())
    return held, sum(math.prod(weight["shape"]) for weight in weights.values())


def kept_files(out):
    return {name: content for name, content in files_of(out).items() if name.endswith(KEPT)}


@pytest.mark.parametrize(
    "changes",
    [
        {"budget": "2.3bits"},
        {"budget": "9KB", "dtype": "float32"},
        {"budget": "5bits", "allocator": "bits", "rank": 2},
        {"budget": "4.5bits", "allocator": "uniform"},
        {"budget": "3.5bits", "allocator": "sara"},
        {"budget": "3.5bits", "allocator": "prilora"},
    ],
)
def test_the_files_are_within_the_budget_and_use_it(source, tmp_path, monkeypatch, changes):
    if "dtype" in changes:  # measured anew
        few(monkeypatch)
    out = qsvd.quantize(options(source, tmp_path / "out", **changes))
    held, elements = stored(out)
    budget = changes["budget"]
    most = 9_000 if budget == "9KB" else float(budget.removesuffix("bits")) * elements / 8
    assert held <= most
    slack = 1.0 if changes.get("allocator") == "uniform" else 0.12
    assert held > (1 - slack) * most
    assert "import qsvd" in (out / "README.md").read_text()


@pytest.fixture(scope="module")
def alone(source, tmp_path_factory):
    """A result that nothing has stopped."""
    with pytest.MonkeyPatch.context() as patched:
        few(patched)
        return qsvd.quantize(options(source, tmp_path_factory.mktemp("alone") / "out")).path


@pytest.mark.parametrize("stage", ["measuring", "splitting"])
def test_a_run_that_was_stopped_ends_in_the_same_files(source, alone, tmp_path, stage, monkeypatch):
    few(monkeypatch)
    wanted = options(source, tmp_path / "stopped")
    if stage == "measuring":
        monkeypatch.setattr(qsvd.prepare.allocate, "measure_candidates", measure_candidates)  # again
        first, rest = StopAfter(5), StopAfter()
        with pytest.raises(Stopped):
            quantize_run(prepare_quantize(wanted), first)
        quantize_run(prepare_quantize(wanted), rest)
        measured = [now.what for now in (*first.seen, *rest.seen) if "measured" in now.what]
        assert measured == [f"{number}/7 weights measured" for number in range(1, 8)], "none is measured twice"
    else:
        with pytest.raises(Stopped):
            quantize_run(prepare_quantize(wanted), StopAfter(7 + 3))
        table = wanted.out / "unfinished" / "allocation.txt"
        text = table.read_text()
        table.write_text(text.replace("nf3-", "nf2-"))
        with pytest.raises(ValueError, match=r"allocation\.txt was edited, and weights may be split already"):
            qsvd.quantize(wanted)
        table.write_text(text)
    assert kept_files(qsvd.quantize(wanted)) == kept_files(alone)
    assert not (wanted.out / "unfinished").exists()
    assert kept_files(qsvd.quantize(wanted)) == kept_files(alone), "a complete result is left as it is"
    with pytest.raises(ValueError, match="was written with other options: budget"):
        qsvd.quantize(replace(wanted, budget="4bits"))


def weighted_error(out, source, statistics):
    """By docs/format.md and LQ-LoRA's approximation of the Fisher information, float64."""
    before, after, factors = tensors_of(source), tensors_of(out), components_of(out)
    moments = {name: t.double().numpy() for name, t in tensors_of(statistics.parent).items() if "proj" in name}
    total = 0.0
    for name, weight in json.loads((out / "qsvd.json").read_text())["weights"].items():
        module = weight["module"]
        dense = residual(weight["codec"], module, weight["shape"], after)
        if weight["rank"]:
            key = f"base_model.model.{module}.lora_"
            dense = dense + factors[f"{key}B.weight"].double().numpy() @ factors[f"{key}A.weight"].double().numpy()
        rows, columns = moments[f"{module}.rows"], moments[f"{module}.columns"]
        total += ((before[name].double().numpy() - dense) ** 2 * np.outer(rows, columns) / rows.mean()).sum()
    return total


def test_fisher_information_is_what_the_split_minimises(source, statistics, tmp_path):
    fisher = {"objective": "fisher", "statistics": statistics}
    errors = {}
    for name, changes in {"plain": {}, "fisher": fisher}.items():
        out = qsvd.quantize(options(source, tmp_path / name, budget="3.5bits", **changes))
        errors[name] = weighted_error(out, source, statistics)
    assert errors["fisher"] < 0.98 * errors["plain"]
    without = options(source, tmp_path / "uniform", budget=None, rank=4)
    uniform = [
        qsvd.quantize(replace(without, out=tmp_path / f"uniform{n}", **way)) for n, way in enumerate(({}, fisher))
    ]
    kinds = [json.loads((out / "config.json").read_text())["quantization_config"] for out in uniform]
    assert kinds[0] == kinds[1], "bitsandbytes' NF4 either way"
    said = ["weighted by Fisher information" in (out / "report.md").read_text() for out in uniform]
    assert said == [False, True]
    before, after = (of_plain_bits(out, source, statistics) for out in uniform)
    assert after < 0.9 * before


def of_plain_bits(out, source, statistics):
    """The weighted error of a base of one codec, whose dense weights qsvd.load has been judged on."""
    moments = tensors_of(statistics.parent)
    split = {name: module for name, module in qsvd.load(out).named_modules() if hasattr(module, "residual")}
    before, total = tensors_of(source), 0.0
    for path, linear in split.items():
        up, down = (factor.detach() for factor in linear.adapter.factors())
        left = before[f"{path}.weight"].double() - linear.residual.decode().double() - (up @ down).double()
        weights = torch.outer(moments[f"{path}.rows"], moments[f"{path}.columns"]).double()
        total += float((left.square() * weights).sum() / moments[f"{path}.rows"].mean())
    return total


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--budget", "1.5bits"], "--budget 1.5bits is too small"),
        (["--budget", "17bits"], "is above 16 bits a number"),
        (["--budget", "3 bytes"], "is not a budget: give bits"),
        (
            ["--budget", "3bits", "--allocation", "x.txt"],
            "--budget and --allocation both set the bits of each layer: give one of them",
        ),
        (["--budget", "3bits", "--dry-run"], "run qsvd allocate, or qsvd plan --budget for the sizes"),
        (
            ["--budget", "3bits", "--rank", "0", "--order", "quantize", "--end", "quantize", "--iterations", "1"],
            "needs at least 2 iterations",
        ),
        (["--allocator", "bits"], "--allocator bits needs a --budget"),
        (["--objective", "fisher"], "--objective fisher needs --statistics FILE"),
        (["--objective", "hessian", "--statistics", "x"], "--objective hessian needs a --budget"),
        (["--statistics", "x"], "--statistics is for --objective fisher or hessian"),
        (
            ["--budget", "3bits", "--objective", "fisher", "--statistics", "nowhere"],
            "nowhere does not exist; qsvd calibrate",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(source, tmp_path, capsys, flags, sentence):
    assert run(["quantize", str(source), "--out", str(tmp_path / "out"), "--rank", "4", *flags]) == 2
    shown = capsys.readouterr().err
    assert sentence in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_statistics_of_another_model_are_refused(statistics, tmp_path, capsys):
    write_checkpoint(tmp_path / "other", hidden_size=64, intermediate_size=96, seed=1)
    flags = ["--objective", "fisher", "--statistics", str(statistics), "--out", str(tmp_path / "out"), "--rank", "4"]
    assert run(["quantize", str(tmp_path / "other"), *flags]) == 2
    assert "has the statistics of another model (tiny, fingerprint" in capsys.readouterr().err


def test_a_result_by_other_statistics_is_another_result(source, statistics, tmp_path):
    wanted = options(source, tmp_path / "out", budget=None, rank=2, objective="fisher", statistics=statistics)
    qsvd.quantize(wanted)
    tensors = {name: 2 * tensor for name, tensor in safetensors.torch.load_file(statistics).items()}
    other = tmp_path / "other.safetensors"
    write_statistics(other, tensors, fingerprint=open_checkpoint(str(source)).fingerprint, record={"model": "tiny"})
    with pytest.raises(ValueError, match="was written with other options: statistics"):
        qsvd.quantize(replace(wanted, statistics=other))


def test_damaged_statistics_are_refused_before_any_work(source, statistics, tmp_path, capsys):
    tensors = safetensors.torch.load_file(statistics)
    name = sorted(tensors)[-1]
    tensors[name][0] = float("nan")
    file = tmp_path / "damaged.safetensors"
    write_statistics(file, tensors, fingerprint=open_checkpoint(str(source)).fingerprint, record={"model": "tiny"})
    flags = ["--objective", "fisher", "--statistics", str(file), "--out", str(tmp_path / "out"), "--rank", "4"]
    assert run(["quantize", str(source), *flags]) == 2
    assert "1 of 7 weights have no usable statistics" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_budget_that_the_disk_does_not_hold_is_refused_before_measuring(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr("qsvd.prepare.quantizing.resources.measure_and_solve", None)
    with pytest.raises(DoesNotFit, match="GB more disk space"):
        qsvd.quantize(options(source, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_every_weight_of_the_table_is_one_of_the_model(source, alone):
    assert list(json.loads((alone / "qsvd.json").read_text())["weights"]) == [
        f"{name}.weight" for name in modules_of(source)
    ]
