"""`qsvd aggregate`: the average of trained products by NumPy in float64, from the files of the runs."""

import json
from functools import cache

import numpy as np
import pytest
import safetensors.torch
import torch

import qsvd
from qsvd.adapters.model import split_linears
from qsvd.cli import run as command
from qsvd.commands.train import train
from tests.commands.trained_runs import LABELS, factors_of, head_of, trained_weights, write_run
from tests.export.cases import make_base, residual
from tests.runs import TRAINED, text_rows, training, write_rows

ROUNDOFF = 2.0**-24 * 256  # of float32, over sums of a hundred numbers
RANK, RECORD = 4, "qsvd_aggregate.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A quantized model, and a function that makes a run: its folder, and what it adds to the stored weights."""
    folder, runs = tmp_path_factory.mktemp("aggregate"), {}
    base = make_base(folder) / "out"

    def run(method, seed):
        if (method, seed) not in runs:
            place = folder / f"{method}-{seed}"
            model = write_run(base, place, method, seed=seed)
            added = {path: weight - stored(base)[path] for path, weight in trained_weights(base, place, model).items()}
            runs[method, seed] = place, added
        return runs[method, seed]

    return base, run


@cache
def stored(base):
    """Q + B0 A0 of every weight, float64, by the path of its layer."""
    weights = json.loads((base / "qsvd.json").read_text())["weights"]
    factors = factors_of(base)
    return {w["module"]: residual(base, name) + np.matmul(*factors[w["module"]]) for name, w in weights.items()}


def added_by(out):
    """B A of every weight in the folder, float64: the scale is 1."""
    tensors = safetensors.torch.load_file(out / TRAINED)
    assert json.loads((out / "qsvd_adapter.json").read_text())["method"] == "lora"
    paths = [name.removesuffix(".up") for name in tensors if name.endswith(".up")]
    return {path: (tensors[f"{path}.up"].double() @ tensors[f"{path}.down"].double()).numpy() for path in paths}


def best(matrix, rank):
    """The best approximation of a rank, and the squared norm of what it leaves out (Eckart and Young)."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank], (values[rank:] ** 2).sum()


@pytest.mark.parametrize(
    ("methods", "weights", "rank"),
    [
        (("lora", "lora"), (), 2 * RANK),
        (("lora", "lora", "lora-fa"), (1, 2, 5), None),
        (("pissa", "pissa"), (), None),
        (("pissa", "lora", "sorsa"), (3, 1, 1), 64),
    ],
)
def test_the_product_is_the_mean_of_the_products_or_the_best_of_a_rank(made, tmp_path, capsys, methods, weights, rank):
    base, make = made
    runs = [make(method, seed) for seed, method in enumerate(methods)]
    flags = [*(("--rank", rank) if rank else ()), *(("--weights", *weights) if weights else ())]
    words = ["aggregate", *(folder for folder, _ in runs), "--out", tmp_path / "run", *flags]
    assert command([str(word) for word in words]) == 0
    shares = np.array(weights or [1] * len(runs)) / sum(weights or [1] * len(runs))
    means = {path: sum(s * added[path] for s, (_, added) in zip(shares, runs, strict=True)) for path in runs[0][1]}
    found, result = added_by(tmp_path / "run"), json.loads((tmp_path / "run" / RECORD).read_text())["result"]
    tails = {}
    for path, mean in means.items():
        wanted, tails[path] = best(mean, rank or RANK)
        assert np.abs(found[path] - wanted).max() < ROUNDOFF * np.abs(stored(base)[path]).max()
        assert result["errors"][path] == pytest.approx((tails[path] / (mean**2).sum()) ** 0.5, rel=1e-3, abs=ROUNDOFF)
    whole = (sum(tails.values()) / sum((mean**2).sum() for mean in means.values())) ** 0.5
    assert result["error"] == pytest.approx(whole, rel=1e-3, abs=ROUNDOFF)
    assert (result["error"] < ROUNDOFF) == (rank is not None), "the ranks that are given leave out nothing"
    assert result["rank"] == (rank or RANK)
    assert f"{result['error']:.2e}" in capsys.readouterr().out


def test_the_result_is_a_run_for_every_reader_and_a_second_call_leaves_it_alone(made, tmp_path, capsys):
    base, make = made
    (first, one), (second, other) = make("lora", 0), make("lora", 1)
    out = qsvd.aggregate(first, second, out=tmp_path / "run", rank=2 * RANK)
    assert (out.rank, len(out.errors)) == (2 * RANK, len(one))
    wanted = {path: stored(base)[path] + (one[path] + other[path]) / 2 for path in one}
    for path, linear in split_linears(qsvd.load(out.path)):
        assert np.abs(linear.weight.double().numpy() - wanted[path]).max() < 1e-5
    peft = safetensors.torch.load_file(out / "adapter_model.safetensors")
    for path in wanted:
        up, down = (peft[f"base_model.model.{path}.lora_{letter}.weight"].double().numpy() for letter in "BA")
        plain = wanted[path] - stored(base)[path] + np.matmul(*factors_of(base)[path])
        assert np.abs(up @ down - plain).max() < 1e-5
    before = {path: path.read_bytes() for path in out.path.iterdir()}
    words = ["aggregate", str(first), str(second), "--out", str(out), "--rank", str(2 * RANK)]
    assert command(words) == 0
    said = capsys.readouterr()
    assert f"{out} was complete already" in said.err
    assert f"{out.error:.2e}" in said.out
    assert {path: path.read_bytes() for path in out.path.iterdir()} == before
    assert command([*words, "--weights", "1", "3"]) == 2
    assert "was written with other options: weights [0.5, 0.5] there, [0.25, 0.75] now" in capsys.readouterr().err
    assert command(["verify", str(out)]) == 0


def test_heads_are_averaged_too(made, tmp_path):
    base, _ = made
    runs = [tmp_path / "one", tmp_path / "two"]
    for seed, folder in enumerate(runs):
        write_run(base, folder, "lora", labels=LABELS, seed=seed)
    out = qsvd.aggregate(*runs, out=tmp_path / "run", weights=[1, 3])
    heads = [head_of(folder) for folder in runs]
    assert head_of(out.path).keys() == heads[0].keys() != set()
    for name, tensor in head_of(out.path).items():
        torch.testing.assert_close(tensor, (heads[0][name] + 3 * heads[1][name]) / 4)


def test_training_goes_on_from_an_average_and_it_generates(tiny, tmp_path, capsys):
    base = tiny
    for seed in (0, 1):
        write_run(base, tmp_path / f"run-{seed}", "lora", seed=seed)
    out = qsvd.aggregate(tmp_path / "run-0", tmp_path / "run-1", out=tmp_path / "average")
    data = write_rows(tmp_path / "texts.jsonl", text_rows()[:4])
    options = training(base, data, tmp_path / "next", steps=1, init_from=out.path, learning_rate=1e-12, any_start=True)
    assert len(train(options).losses) == 1
    for path, product in added_by(tmp_path / "next").items():
        assert np.abs(product - added_by(out.path)[path]).max() < 1e-6
    assert command(["generate", str(out), "--prompt", "The", "--max-new-tokens", "2", "--device", "cpu"]) == 0
    assert capsys.readouterr().out
