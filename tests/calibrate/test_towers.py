"""Calibration on images, with and without the weights of their encoder, judged by autograd on transformers' model."""

import pytest
import safetensors.torch
import torch
import transformers

import qsvd
from qsvd.cli import run
from qsvd.errors import BadInput
from qsvd.prepare.quantize import prepare_quantize
from tests.training.test_images import read, simple
from tests.vision import KINDS, write_lines, write_model

pytestmark = pytest.mark.slow
ROUNDOFF = 2e-4  # relative, of squares of float32 gradients


def judged(source, kind, rows, folder):
    """Mean squares of the gradients of all linear weights over the rows, by module."""
    model = getattr(transformers, KINDS[kind][1]).from_pretrained(source, dtype=torch.float32).eval()
    sums = {}
    for row in rows:
        inputs, labels = read(source, [row], folder)
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        for path, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and module.weight.grad is not None:
                sums[path] = sums.get(path, 0) + module.weight.grad.double().square() / len(rows)
    return sums


@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_those_of_whole_models_with_images(tmp_path, kind):
    source, rows = write_model(tmp_path / "source", kind), simple(tmp_path)
    data = write_lines(tmp_path / "rows.jsonl", rows)
    chosen = {"examples": len(rows), "device": "cpu", "include_towers": True, "chunk": 3}
    qsvd.calibrate(source, data, out=tmp_path / "stats.safetensors", **chosen)
    found, sums = safetensors.torch.load_file(tmp_path / "stats.safetensors"), judged(source, kind, rows, tmp_path)
    towers = {name for name in found if "vision_tower" in name}
    used = {name.rpartition(".")[0] for name in found if found[name].any()}
    assert len(towers) >= 2 * 6
    assert {name.rpartition(".")[0] for name in towers} & used
    assert {name for name in found if name.endswith(".rows")} >= {f"{path}.rows" for path in used}
    for path in {name.rpartition(".")[0] for name in found}:
        wanted = sums.get(path, torch.zeros(len(found[f"{path}.rows"]), len(found[f"{path}.columns"])))
        for part, axis in (("rows", 1), ("columns", 0)):
            torch.testing.assert_close(
                found[f"{path}.{part}"].double(), wanted.mean(axis).double(), rtol=ROUNDOFF, atol=1e-12, msg=path
            )
    options = {"budget": "5bits", "objective": "fisher", "statistics": tmp_path / "stats.safetensors"}
    prepare_quantize(qsvd.Quantize(str(source), out=tmp_path / "out", include_towers=True, **options))


def test_an_encoder_is_not_measured_without_images(tmp_path):
    source = write_model(tmp_path / "source")
    data = write_lines(tmp_path / "rows.jsonl", [{"text": "A field."}] * 3)
    with pytest.raises(BadInput, match=r"--include-towers measures the encoder of images, and .* has no images"):
        qsvd.calibrate(source, data, out=tmp_path / "s", examples=3, include_towers=True)
    with pytest.raises(BadInput, match="--include-towers measures Fisher information alone: leave out --traces"):
        qsvd.calibrate(source, data, out=tmp_path / "s", examples=3, include_towers=True, traces=1)
    assert run(["calibrate", str(source), data, "--out", str(tmp_path / "s"), "--examples", "3"]) == 0
