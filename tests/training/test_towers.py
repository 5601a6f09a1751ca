"""A quantized encoder of images: planned, trained around, measured and merged, judged by dense weights Q + B A."""

import json

import pytest
import safetensors.torch
import torch
import transformers

import qsvd
from qsvd.adapters.model import split_linears
from qsvd.adapters.start import new_record, planned_base
from qsvd.errors import BadInput
from qsvd.files.split_folder import open_split
from qsvd.memory.encoder import encoder_bytes
from qsvd.memory.twins import LiveBytes
from qsvd.prepare.train import prepare_train
from tests.commands.folders import files_of
from tests.runs import training
from tests.training.test_images import CLOSE, LEARNS, read, simple
from tests.vision import SIDE, dense, write_lines, write_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """OUT with a quantized encoder, and data."""
    folder = tmp_path_factory.mktemp("towers")
    source = write_model(folder / "source", "gemma3")
    out = qsvd.quantize(str(source), out=folder / "out", rank=8, device="cpu", include_towers=True).path
    return out, write_lines(folder / "rows.jsonl", simple(folder))


def in_tower(name):
    return "vision_tower" in name


def test_the_encoder_is_quantized_and_frozen_and_the_loss_is_that_of_dense_weights(made, tmp_path):
    out, data = made
    inputs, labels = read(out, simple(out.parent), out.parent)
    with torch.no_grad():
        wanted = dense(out, "gemma3")(**inputs, labels=labels).loss.item()
    options = training(out, data, tmp_path / "run", steps=2, batch_size=4, accumulate=1, **LEARNS)
    run = qsvd.train(options)
    assert run.losses[0] == pytest.approx(wanted, rel=CLOSE)
    assert qsvd.evaluate(out, data=data, device="cpu").rows[0].values["nats"] == pytest.approx(wanted, rel=CLOSE)
    saved = safetensors.torch.load_file(tmp_path / "run" / "qsvd_adapter.safetensors")
    assert saved
    assert not any(map(in_tower, saved))
    qsvd.export(tmp_path / "run", out=tmp_path / "merged", to="merged", dtype="float32")
    nats = qsvd.evaluate(tmp_path / "run", data=data, device="cpu").rows[0].values["nats"]
    merged = transformers.Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        assert merged.eval()(**inputs, labels=labels).loss.item() == pytest.approx(nats, rel=CLOSE)
    kept, start = merged.state_dict(), dense(out, "gemma3").state_dict()
    for name in filter(in_tower, start):
        assert torch.allclose(kept[name], start[name], rtol=CLOSE, atol=CLOSE), name
    assert nats < wanted


def test_the_plan_counts_the_encoder(made, tmp_path):
    out, data = made
    split, model = open_split(out), qsvd.load(out, device="cpu")
    memory = prepare_train(training(out, data, tmp_path / "run", batch_size=4, **LEARNS)).placed.memory
    residuals = [linear.residual for _, linear in split_linears(model)]
    codes = sum(residual.codes.nbytes for residual in residuals)
    assert memory["residual codes"].host == codes
    assert memory["trained parameters"].host == sum(p.nbytes for p in model.parameters() if p.requires_grad)
    frozen = [buffer for _, linear in split_linears(model) for buffer in linear.adapter.buffers()]
    assert memory["frozen components"].host == sum(buffer.nbytes for buffer in frozen) > 0
    pixels = torch.randn(3, 3, SIDE, SIDE)
    live = LiveBytes(
        [*model.parameters(), *model.buffers(), *(t for r in residuals for t in r.tensors().values()), pixels]
    )
    with torch.no_grad(), live:
        model.get_image_features(pixel_values=pixels)
    planned = planned_base(split, new_record(split, qsvd.AdapterOptions()), torch.float32)
    assert live.peak <= encoder_bytes(planned, pixels.numel(), "cpu")


def test_one_command_quantizes_the_encoder_too(made, tmp_path):
    out, data = made
    options = training(out.parent / "source", data, tmp_path / "run", steps=1, rank=8, include_towers=True, **LEARNS)
    qsvd.train(options)
    found = tmp_path / "source-nf4-r8-towers"
    assert (
        json.loads((found / "qsvd.json").read_text())["fingerprint"]
        == json.loads((out / "qsvd.json").read_text())["fingerprint"]
    )
    shards = {name: data for name, data in files_of(out).items() if name.endswith(".safetensors")}
    again = files_of(found)
    assert {name: again[name] for name in shards} == shards
    planned = [
        qsvd.plan(model, data, device="cpu", max_length=96, **towers).train.placed.memory
        for model, towers in ((out, {}), (out.parent / "source", {"include_towers": True, "rank": 8}))
    ]
    assert planned[0].items == planned[1].items


def test_layers_of_the_encoder_are_not_trained_and_the_option_is_for_16_bit_models(made, tmp_path):
    out, data = made
    with pytest.raises(BadInput, match="no quantized layer is called fc1"):
        qsvd.train(training(out, data, tmp_path / "run", target_modules=("fc1",), **LEARNS))
    with pytest.raises(BadInput, match="is quantized already, and --include-towers can be used for 16-bit models only"):
        qsvd.train(training(out, data, tmp_path / "run", include_towers=True, **LEARNS))
