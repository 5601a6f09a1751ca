"""The merged checkpoint: float64 NumPy on the base's files, plain transformers on the result."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

import qsvd
from qsvd.export import merged as export_merged
from qsvd.export.merged import MergedExport, MergedForm, write_merged
from qsvd.export.trained import Trained
from tests.commands.folders import files_of as bytes_of
from tests.commands.folders import shared_model
from tests.export.cases import (
    HALF_ULP,
    as_model,
    assert_same_outputs,
    dense,
    dense_model,
    exact_outputs,
    files_of,
    make_base,
    outputs,
    perturbed,
    roundoff,
    trained_weights,
)
from tests.sealed import without_digests


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = make_base(tmp_path_factory.mktemp("llama"))
    (folder / "out" / "tokenizer.json").write_text("{}")
    (folder / "out" / "LICENSE").write_text("free")
    (folder / "out" / "additional_chat_templates").mkdir()
    (folder / "out" / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("bert"), "BertModel", dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gains", [False, True])
def test_every_weight_is_the_dense_matrix_rounded_once(llama, tmp_path, dtype, gains):
    trained = perturbed(llama / "out", gains=gains, added=(0, 2))
    result = write_merged(as_model(llama / "out", trained), tmp_path / "x", MergedForm(dtype))
    written = files_of(tmp_path / "x")
    assert result == MergedExport(14, 0, 1, str(dtype)[6:], sum(t.nbytes for t in written.values()))
    assert set(written) == set(files_of(llama / "source"))
    for name, weight in trained.items():
        exact = dense(llama / "out", name, weight)
        off = np.abs(written[name].double().numpy() - exact)
        assert written[name].dtype == dtype
        smallest = torch.finfo(dtype).smallest_normal
        float32 = roundoff(llama / "out", name, weight)
        assert (off <= float32 + HALF_ULP[dtype] * np.maximum(np.abs(exact) + float32, smallest)).all()


def test_plain_transformers_gives_the_trained_logits(llama, tmp_path):
    trained = perturbed(llama / "out", gains=True)
    write_merged(as_model(llama / "out", trained), tmp_path / "x", MergedForm(torch.float32))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert model.dtype == torch.float32
    assert_same_outputs(model, *exact_outputs(llama / "source", trained_weights(llama / "out", trained)))


def test_the_rest_of_the_base_is_copied_byte_for_byte(llama, tmp_path):
    trained = perturbed(llama / "out")
    write_merged(as_model(llama / "out", trained), tmp_path / "x", MergedForm())
    written, source = files_of(tmp_path / "x"), files_of(llama / "source")
    for name in source.keys() - trained.keys():
        assert written[name].dtype == torch.bfloat16
        assert torch.equal(written[name], source[name])
    for file in ("tokenizer.json", "LICENSE", "generation_config.json", "additional_chat_templates/tool_use.jinja"):
        assert (tmp_path / "x" / file).read_bytes() == (llama / "out" / file).read_bytes()
    config, before = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "x", llama / "source"))
    assert config == before
    names = {path.name for path in (tmp_path / "x").iterdir()}
    assert names == {"config.json", "generation_config.json", "tokenizer.json", "LICENSE", "model.safetensors"} | {
        "qsvd_export.json",
        "additional_chat_templates",
    }


def test_another_dtype_is_for_what_had_the_dtype_of_the_weights(tmp_path):
    make_base(tmp_path, dtype=torch.bfloat16)
    without_digests(tmp_path / "out")
    kept = "model.norm.weight"
    for path in (tmp_path / "out").glob("*.safetensors"):
        tensors = safetensors.torch.load_file(path)
        if kept in tensors:
            tensors[kept] = tensors[kept].float() + 1e-6
            safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
            norm = tensors[kept]
    trained = perturbed(tmp_path / "out")
    write_merged(as_model(tmp_path / "out", trained), tmp_path / "x", MergedForm(torch.float16))
    written, source = files_of(tmp_path / "x"), files_of(tmp_path / "source")
    assert torch.equal(written[kept], norm)
    assert torch.equal(written["model.embed_tokens.weight"], source["model.embed_tokens.weight"].half())
    assert {t.dtype for name, t in written.items() if name != kept} == {torch.float16}
    assert json.loads((tmp_path / "x" / "config.json").read_text())["dtype"] == "float16"


def test_shards_hold_at_most_what_they_may_and_load_as_one_model(llama, tmp_path):
    trained = perturbed(llama / "out")
    model = as_model(llama / "out", trained)
    result = write_merged(model, tmp_path / "x", MergedForm(shard_bytes=50_000))
    files = sorted((tmp_path / "x").glob("*.safetensors"))
    assert result.shards == len(files) > 3
    assert [file.name for file in files] == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    assert all(file.stat().st_size <= 50_000 for file in files)
    index = json.loads((tmp_path / "x" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == result.num_bytes
    assert index["weight_map"] == {name: file.name for file in files for name in safetensors.torch.load_file(file)}
    write_merged(model, tmp_path / "one", MergedForm())
    in_shards, in_one = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f) for f in ("x", "one"))
    assert torch.equal(outputs(in_shards), outputs(in_one))


class Stop(Exception):
    """A kill."""


def test_a_killed_run_keeps_finished_shards_and_ends_with_the_same_bytes(llama, tmp_path, monkeypatch):
    trained = perturbed(llama / "out")
    form = MergedForm(shard_bytes=50_000)
    write_merged(as_model(llama / "out", trained), tmp_path / "whole", form)
    write = export_merged.write_stream

    def dying(path, tensors, metadata):
        if "00003" in path.name:
            raise Stop
        write(path, tensors, metadata)

    monkeypatch.setattr(export_merged, "write_stream", dying)
    with pytest.raises(Stop):
        write_merged(as_model(llama / "out", trained), tmp_path / "x", form)
    monkeypatch.undo()
    first = sorted((tmp_path / "x").glob("*.safetensors"))
    assert len(first) == 2
    times = [path.stat().st_mtime_ns for path in first]
    other = as_model(llama / "out", perturbed(llama / "out", seed=1))
    with pytest.raises(ValueError, match="x was written with other options: the run changed"):
        write_merged(other, tmp_path / "x", form)
    with pytest.raises(ValueError, match="x was written with other options: shard_bytes 50000 there, 60000 now"):
        write_merged(as_model(llama / "out", trained), tmp_path / "x", MergedForm(shard_bytes=60_000))
    write_merged(as_model(llama / "out", trained), tmp_path / "x", form)
    assert [path.stat().st_mtime_ns for path in first] == times
    assert bytes_of(tmp_path / "x") == bytes_of(tmp_path / "whole")


HEAD = {"classifier.weight": torch.linspace(-1, 1, 192).reshape(3, 64), "classifier.bias": torch.arange(3.0)}
CLASSIFIER = {
    "architectures": ["BertForSequenceClassification"],
    "id2label": {0: "no", 1: "yes", 2: "maybe"},
    "label2id": {"no": 0, "yes": 1, "maybe": 2},
}


def test_a_new_head_makes_a_classifier(bert, tmp_path):
    trained = perturbed(bert / "out")
    names = files_of(bert / "source")
    full = HEAD | {"bert.pooler.dense.bias": torch.full((64,), 0.25)}
    model = as_model(bert / "out", trained, full=full, spelling={f"bert.{name}": name for name in names})
    result = write_merged(model, tmp_path / "x", MergedForm(config_changes=CLASSIFIER))
    assert result.full == 3
    assert set(files_of(tmp_path / "x")) == {*names, *HEAD}, "the pooler's bias is replaced, not added"
    auto = transformers.AutoModelForSequenceClassification
    loaded = auto.from_pretrained(tmp_path / "x")
    assert loaded.config.id2label == CLASSIFIER["id2label"]
    weights = {f"bert.{path}": weight for path, weight in trained_weights(bert / "out", trained).items()}
    exact = []
    for dtype in (torch.float64, torch.float32):
        reference = dense_model(bert / "source", weights, dtype, auto, num_labels=3)
        for name, tensor in full.items():
            reference.get_parameter(name).data = tensor.to(dtype)
        exact.append(outputs(reference))
    assert_same_outputs(loaded, exact[0], (exact[1] - exact[0]).abs().max().item())
    write_merged(model, tmp_path / "x", MergedForm(config_changes=CLASSIFIER))  # integer keys of JSON come back as text


def test_a_new_parameter_needs_another_config(bert, tmp_path):
    full = {"classifier.bias": torch.ones(3), "pooler.dense.bias": torch.ones(65)}
    model = as_model(bert / "out", perturbed(bert / "out"), full=full)
    sentence = r"classifier.bias is not in the quantized model, pooler.dense.bias is \[65\] instead of \[64\]: the con"
    with pytest.raises(ValueError, match=sentence):
        write_merged(model, tmp_path / "x", MergedForm())
    assert not (tmp_path / "x").exists()


def test_values_beyond_float16_are_refused(llama, tmp_path):
    trained = perturbed(llama / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    trained[name] = Trained(1e6 * trained[name].up_OK, trained[name].down_KI)
    with pytest.raises(ValueError, match=r"up_proj.weight has values outside the range of float16; export in bf"):
        write_merged(as_model(llama / "out", trained), tmp_path / "x", MergedForm(torch.float16))
    write_merged(as_model(llama / "out", trained), tmp_path / "x", MergedForm(torch.bfloat16))


def test_an_unknown_dtype_is_refused(llama, tmp_path):
    with pytest.raises(ValueError, match="dtype float64 is not float32, bfloat16 or float16"):
        write_merged(as_model(llama / "out", {}), tmp_path / "x", MergedForm(torch.float64))


@pytest.mark.slow
def test_a_trained_model_with_blocks_across_rows_gives_the_trained_logits(tmp_path):
    source = shared_model("stories260K")
    qsvd.quantize(qsvd.Quantize(str(source), out=tmp_path / "out", rank=16, iterations=1))
    trained = perturbed(tmp_path / "out", size=0.02)
    result = write_merged(as_model(tmp_path / "out", trained), tmp_path / "x", MergedForm())
    assert (result.weights, result.dtype) == (35, "float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert_same_outputs(model, *exact_outputs(source, trained_weights(tmp_path / "out", trained)))
    assert (tmp_path / "x" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    given, written = (json.loads((at / "tokenizer_config.json").read_text()) for at in (source, tmp_path / "x"))
    assert written == given | {"pad_token": "</s>"}  # the source has none
