"""The file of statistics: read back as written, judged by the safetensors library, and what is no such file."""

import json

import pytest
import safetensors
import safetensors.torch
import torch

from qsvd.files.statistics import (
    check_statistics,
    open_statistics,
    open_unfinished,
    save_unfinished,
    unfinished_path,
    write_statistics,
)

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
FINGERPRINT = "3f" * 32
RECORD = {"model": "some/model", "examples": 4, "loss": 1.25, "run": {"seed": 0}}
STAMPS = {"model.safetensors": (1, 2)}


def tensors(*, traces=True):
    found = {}
    for number, module in enumerate((Q, DOWN)):
        found[f"{module}.rows"] = torch.tensor([1.0, 2.0, 6.0]) + number
        found[f"{module}.columns"] = torch.tensor([2.0, 4.0]) + number
        if traces:
            found[f"{module}.trace"] = torch.tensor([-1.5 - number])
            found[f"{module}.trace_error"] = torch.tensor([0.25])
    return found


@pytest.fixture
def path(tmp_path):
    write_statistics(tmp_path / "s.safetensors", tensors(), fingerprint=FINGERPRINT, record=RECORD)
    return tmp_path / "s.safetensors"


def test_what_was_written_comes_back(path):
    found = open_statistics(path)
    assert (found.fingerprint, found.modules, dict(found.record)) == (FINGERPRINT, (Q, DOWN), RECORD)
    assert [found.trace(module) for module in (Q, DOWN)] == [-1.5, -2.5]
    objective = found.objective(DOWN)  # moments 2, 3, 7 and 3, 5: F_ij ~ row_i column_j / 4
    assert objective.rows_O.square().tolist() == pytest.approx([2, 3, 7], rel=1e-6)
    assert objective.columns_I.square().tolist() == pytest.approx([3 / 4, 5 / 4], rel=1e-6)


def test_other_libraries_read_it(path):
    found = safetensors.torch.load_file(path)
    assert found.keys() == tensors().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors().items())
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "qsvd statistics 2"
    assert metadata["fingerprint"] == FINGERPRINT
    assert json.loads(metadata["record"]) == RECORD


def test_without_traces_the_fix_is_named(tmp_path):
    path = tmp_path / "s.safetensors"
    write_statistics(path, tensors(traces=False), fingerprint=FINGERPRINT, record=RECORD)
    found = open_statistics(path)
    assert not found.has_traces
    assert found.objective(Q).rows_O is not None
    with pytest.raises(
        ValueError, match=r"^.*s.safetensors has no traces of the Hessian; run qsvd calibrate again with --traces 8$"
    ):
        found.trace(Q)


def test_statistics_of_another_model_are_refused(path):
    found = open_statistics(path)
    check_statistics(found, FINGERPRINT, [DOWN])
    sentence = (
        r"^.*s.safetensors has the statistics of another model \(some/model, fingerprint 3f3f3f3f3f3f instead of "
        r"aaaaaaaaaaaa\); run qsvd calibrate on this one$"
    )
    with pytest.raises(ValueError, match=sentence):
        check_statistics(found, "a" * 64, [Q])


def test_statistics_that_lack_weights_are_refused(path):
    sentence = r"lacks 2 of 3 weights: model.layers.2.a, model.layers.2.b; run qsvd calibrate with the same --include"
    with pytest.raises(ValueError, match=sentence):
        check_statistics(open_statistics(path), FINGERPRINT, ["model.layers.2.b", Q, "model.layers.2.a"])
    with pytest.raises(ValueError, match=r"s.safetensors: model.layers.2.a: the file has no rows of model.layers.2.a"):
        open_statistics(path).objective("model.layers.2.a")


def test_moments_that_are_none_are_refused_with_their_place(tmp_path):
    broken = tensors() | {f"{Q}.rows": torch.tensor([1.0, float("nan"), 2.0])}
    write_statistics(tmp_path / "s", broken, fingerprint=FINGERPRINT, record=RECORD)
    with pytest.raises(ValueError, match=rf"/s: {Q}: 1 of 5 moments of the gradient are negative, NaN or infinite$"):
        open_statistics(tmp_path / "s").objective(Q)


def test_what_is_no_file_of_statistics_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"absent does not exist; qsvd calibrate MODEL DATA --out .*/absent makes it$"):
        open_statistics(tmp_path / "absent")
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "model", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model was not written by qsvd calibrate \(format 'pt'\); give another"):
        open_statistics(tmp_path / "model")
    some = {name: tensor for name, tensor in tensors().items() if name != f"{DOWN}.columns"}
    write_statistics(tmp_path / "part", some, fingerprint=FINGERPRINT, record=RECORD)
    with pytest.raises(ValueError, match=rf"part is damaged: {DOWN}.columns; run qsvd calibrate again$"):
        open_statistics(tmp_path / "part")
    write_statistics(tmp_path / "none", {}, fingerprint=FINGERPRINT, record=RECORD)
    with pytest.raises(ValueError, match=r"none is damaged: it has no weights; run qsvd calibrate again$"):
        open_statistics(tmp_path / "none")


def test_unfinished_sums_come_back_for_the_same_run_alone(tmp_path):
    out, sums = tmp_path / "s.safetensors", {"q.rows": torch.arange(3, dtype=torch.float64) / 7}
    assert open_unfinished(out, {"seed": 0}, STAMPS) is None
    save_unfinished(out, sums, {"seed": 0, "traces": 2}, STAMPS)
    assert unfinished_path(out).name == "s.safetensors.unfinished"
    assert torch.equal(open_unfinished(out, {"traces": 2, "seed": 0}, STAMPS)["q.rows"], sums["q.rows"])
    sentence = (
        r"unfinished was written with other options: seed 0 there, 1 now; give the same options to continue, or "
        r"remove the file, or give --out another file$"
    )
    with pytest.raises(ValueError, match=r"^model.safetensors of the 16-bit model changed after .*finished was begun"):
        open_unfinished(out, {"seed": 0, "traces": 2}, {"model.safetensors": (1, 3)})
    with pytest.raises(ValueError, match=sentence):
        open_unfinished(out, {"seed": 1, "traces": 2}, STAMPS)
    write_statistics(unfinished_path(out), tensors(), fingerprint=FINGERPRINT, record=RECORD)
    with pytest.raises(ValueError, match=r"was not written by qsvd calibrate \(.*\); move it, or give --out another"):
        open_unfinished(out, {"seed": 0, "traces": 2}, STAMPS)
