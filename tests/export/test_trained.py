"""What is refused before an export is begun, and the folder that it is written into."""

import shutil
from dataclasses import dataclass

import pytest
import torch

from qsvd.errors import DoesNotFit
from qsvd.export.trained import ExportFolder, Trained, check_dtype, rounded, take_inventory
from tests.export.cases import as_model, dense, files_of, make_base, perturbed, roundoff
from tests.sealed import opened

RUN = {"to": "merged", "labels": {0: "a"}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base")) / "out"


def test_the_inventory_counts_ranks_and_gains(base):
    trained = perturbed(base, added=(0, 2, 5))
    found = take_inventory(as_model(base, trained))
    assert found.ranks == {name: 4 + (0, 2, 5)[n % 3] for n, name in enumerate(trained)}
    assert not found.has_gains
    assert take_inventory(as_model(base, perturbed(base, gains=True))).has_gains


def test_the_digest_is_of_every_value(base):
    trained = perturbed(base, gains=True)
    last = list(trained)[-1]
    digests = set()
    for part in (None, "up_OK", "down_KI", "gain_O"):
        parts = {field: getattr(trained[last], field).clone() for field in ("up_OK", "down_KI", "gain_O")}
        if part:
            parts[part].view(-1)[-1] += 1e-6
        digests.add(take_inventory(as_model(base, trained | {last: Trained(**parts)})).digest)
    for value in (1.0, 2.0):
        digests.add(take_inventory(as_model(base, trained, full={"head.bias": torch.full((2,), value)})).digest)
    assert len(digests) == 6
    assert take_inventory(as_model(base, perturbed(base, gains=True))).digest in digests


def test_parameters_of_a_live_model_are_read_apart_from_its_graph(base):
    trained = perturbed(base, gains=True)
    live = {
        name: Trained(*(torch.nn.Parameter(t) for t in (weight.up_OK, weight.down_KI, weight.gain_O)))
        for name, weight in trained.items()
    }
    name = list(trained)[3]
    model = as_model(base, live)
    assert not model.dense(name).requires_grad
    exact, bound = dense(base, name, trained[name]), roundoff(base, name, trained[name])
    assert (abs(model.dense(name).double().numpy() - exact) <= bound).all()


def test_other_tensors_are_those_that_no_split_weight_needs(base):
    source = files_of(base.parent / "source")
    model = as_model(base, {})
    assert set(model.others()) == source.keys() - model.split.weights.keys()


def test_modules_are_named_as_the_trained_model_names_them(base):
    model = as_model(base, {})
    first, second, *_ = model.split.weights
    spelled = as_model(base, {}, spelling={f"wrapped.{first}": first}).modules()
    assert spelled[first] == f"wrapped.{first}".removesuffix(".weight")
    assert spelled[second] == second.removesuffix(".weight")


def test_missing_weights_are_refused_together(base):
    trained = perturbed(base)
    for name in list(trained)[:2]:
        del trained[name]
    names = "model.layers.0.self_attn.q_proj.weight, model.layers.0.self_attn.k_proj.weight"
    with pytest.raises(ValueError, match=f"do not fit .*out: 2 of 14 weights are missing \\({names}\\)$"):
        take_inventory(as_model(base, trained))


FIRST = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda w: Trained(w.up_OK.bfloat16(), w.down_KI), r"up is bfloat16 \[64, 4\] instead of float32 \[64, 4\]"),
        (lambda w: Trained(w.up_OK[:, :3], w.down_KI), r"up is float32 \[64, 3\] instead of float32 \[64, 4\]"),
        (lambda w: Trained(w.up_OK, w.down_KI[:, :5]), r"down is float32 \[4, 5\] instead of float32 \[4, 64\]"),
        (lambda w: Trained(w.up_OK, w.down_KI[0, 0]), r"down is float32 \[\] instead of float32 \[0, 64\]"),
        (lambda w: Trained(w.up_OK, w.down_KI / 0), "down has a NaN or an infinity"),
        (lambda w: Trained(w.up_OK, w.down_KI, torch.ones(4)), r"gain is float32 \[4\] instead of float32 \[64\]"),
    ],
)
def test_values_that_do_not_fit_are_refused(base, change, fault):
    trained = perturbed(base)
    trained[FIRST] = change(trained[FIRST])
    with pytest.raises(ValueError, match=rf"do not fit .*out: .*{FIRST}: {fault}"):
        take_inventory(as_model(base, trained))


def test_gains_of_some_weights_only_are_refused(base):
    trained = perturbed(base, gains=True)
    trained[FIRST] = Trained(trained[FIRST].up_OK, trained[FIRST].down_KI)
    with pytest.raises(ValueError, match=rf"1 of 14 weights have no gain \({FIRST}\); give one to all or to none"):
        take_inventory(as_model(base, trained))


@pytest.mark.parametrize(
    ("name", "tensor", "fault"),
    [
        (FIRST, torch.ones(64, 64), "a split weight cannot be trained in full"),
        (f"m.{FIRST}", torch.ones(64, 64), "a split weight cannot be trained in full"),
        ("head", torch.ones(2, dtype=torch.int64), "it is int64, not a float tensor"),
        ("head", torch.tensor([1, torch.nan]), "it has a NaN or an infinity"),
    ],
)
def test_parameters_in_full_that_cannot_be_are_refused(base, name, tensor, fault):
    model = as_model(base, perturbed(base), full={name: tensor}, spelling={f"m.{FIRST}": FIRST})
    with pytest.raises(ValueError, match=f"do not fit .*out: {name}: {fault}"):
        take_inventory(model)


def test_only_three_dtypes_are_written():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_dtype(dtype)
    with pytest.raises(ValueError, match="dtype int8 is not float32, bfloat16 or float16"):
        check_dtype(torch.int8)


def test_a_value_beyond_the_range_is_refused():
    assert rounded(torch.tensor([65504.0]), torch.float16, "w").item() == 65504
    with pytest.raises(ValueError, match="w has values outside the range of float16; export in bfloat16 or float32"):
        rounded(torch.tensor([65520.0]), torch.float16, "w")


def test_a_folder_with_anything_else_in_it_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="is not empty and was not written by qsvd export; give --out another folder"):
        ExportFolder(tmp_path, RUN, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@dataclass(frozen=True)
class Done:
    n: int


def test_an_empty_folder_and_what_a_kill_left_in_its_first_moment_are_taken(tmp_path):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "lock").touch()
    with ExportFolder(tmp_path, RUN, 0) as export:
        assert not export.is_complete
        export.finish({"n": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["qsvd_export.json"]
    with ExportFolder(tmp_path, RUN, 10**18) as export:
        assert export.is_complete
        assert export.result(Done) == Done(1)


def test_what_a_kill_at_the_very_end_left_goes(tmp_path):
    with ExportFolder(tmp_path, RUN, 0) as export:
        export.finish({})
    (tmp_path / "unfinished").mkdir()
    with ExportFolder(tmp_path, RUN, 0) as export:
        assert export.is_complete
    assert not (tmp_path / "unfinished").exists()


def test_a_failed_export_leaves_what_is_finished_and_otherwise_nothing(tmp_path):
    with pytest.raises(KeyError), ExportFolder(tmp_path / "x", RUN, 0):
        raise KeyError
    assert not (tmp_path / "x").exists()
    with ExportFolder(tmp_path / "x", RUN, 0) as export:
        (export.folder / "part").touch()
    assert opened(tmp_path / "x" / "unfinished" / "run.json") == RUN | {"labels": {"0": "a"}}
    with pytest.raises(
        ValueError, match='x was written with other options: to "merged" there, "lora" now; give the same options'
    ):
        ExportFolder(tmp_path / "x", RUN | {"to": "lora"}, 0)


def test_two_processes_do_not_write_into_one_folder(tmp_path):
    with (
        ExportFolder(tmp_path, RUN, 0),
        pytest.raises(ValueError, match=r"another qsvd process is writing to .*; wait for it"),
    ):
        ExportFolder(tmp_path, RUN, 0)


def test_a_disk_too_small_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**10, 0, 10**9))
    with pytest.raises(DoesNotFit, match=r"x needs 1.50 GB more disk space \(.* has 1.00 GB free\); free some, or"):
        ExportFolder(tmp_path / "deep" / "x", RUN, 1_500_000_000)
    assert not (tmp_path / "deep").exists()
    with ExportFolder(tmp_path / "x", RUN, 999_999_999) as export:
        (export.folder / "part").write_bytes(bytes(1000))
    ExportFolder(tmp_path / "x", RUN, 1_000_000_900)  # what is written counts
