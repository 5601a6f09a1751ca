"""`qsvd.load` against plain transformers with Q + B A in the place of each split weight, and against PEFT."""

import json
import shutil

import pytest
import torch
import transformers

import qsvd
from qsvd.adapters.linear import SplitLinear
from tests.adapters.results import (
    IDS,
    assert_as_exact_as_float32,
    distance,
    exact_outputs,
    in_float32,
    modules_of,
    outputs,
    plain_model,
    split_checkpoint,
)
from tests.checkpoints import FAMILIES, REFUSED, WITH_EXPERTS, write_checkpoint
from tests.sealed import without_digests

SAME_LAYERS = {  # as in others here; all families: tests/tools/test_families.py
    *("MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "PhiForCausalLM", "BertModel", "GemmaForCausalLM"),
    *("LlamaForCausalLM", "Phi3ForCausalLM", "GPTNeoXForCausalLM", "OPTForCausalLM", "RobertaForMaskedLM"),
}
CASES = [(family, {}) for family in sorted(FAMILIES.keys() - REFUSED - WITH_EXPERTS - SAME_LAYERS)] + [
    ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    ("LlamaForCausalLM", {"shard_size": "100KB", "vocab_size": 1024}),
    ("LlamaForCausalLM", {"rank": 0}),
    ("LlamaForCausalLM", {"attention_bias": True, "dtype": torch.float16}),
    ("BertForMaskedLM", {"tie_word_embeddings": False}),
]
PEFT_READS_AN_OLD_NAME = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # PEFT 0.21, transformers 5


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A split Llama, of widths that bitsandbytes decodes rightly on every CPU."""
    return split_checkpoint(tmp_path_factory.mktemp("result"), hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module")
def exact(out):
    """The outputs of the plain model, and how far from them float32 may be."""
    return exact_outputs(plain_model(out))


def changed(out, folder, change):
    """A copy of a result with another qsvd.json, or config.json."""
    without_digests(shutil.copytree(out, folder))
    for path in (folder / "qsvd.json", folder / "config.json"):
        fields = json.loads(path.read_text())
        change(path.name, fields)
        path.write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize(("architecture", "options"), CASES)
def test_outputs_are_those_of_the_plain_model_with_dense_weights(tmp_path, architecture, options):
    out = split_checkpoint(tmp_path, architecture, **options)
    model = qsvd.load(out)
    assert type(model).__name__ == architecture
    assert isinstance(model, getattr(transformers, architecture))
    assert not model.training
    split = {path for path, module in model.named_modules() if isinstance(module, SplitLinear)}
    assert split == modules_of(out)
    factors = {f"{path}.adapter.{factor}" for path in split for factor in ("up", "down")}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == factors
    assert_as_exact_as_float32(model, exact_outputs(plain_model(out), architecture), architecture)


def test_without_the_stored_components_the_outputs_would_be_others(out, exact):
    model = qsvd.load(out)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, SplitLinear):
                module.adapter.up.zero_()
    assert distance(outputs(model), exact[0]) > 100 * exact[1]


def test_a_gain_of_one_changes_no_bit(out):
    assert torch.equal(outputs(qsvd.load(out, options=qsvd.AdapterOptions("edora"))), outputs(qsvd.load(out)))


def test_generation_is_greedy_like_the_plain_models(out):
    plain, model = plain_model(out).float(), qsvd.load(out)
    ours, theirs = (one.generate(IDS, max_new_tokens=12, do_sample=False) for one in (model, plain))
    assert ours.shape == (2, 28)
    assert torch.equal(ours, theirs)


def test_the_generation_config_is_the_sources(tmp_path):
    write_checkpoint(tmp_path / "source")
    out = qsvd.quantize(str(tmp_path / "source"), out=tmp_path / "out", rank=4, iterations=1, device="cpu").path
    source, copy = json.loads((out / "generation_config.json").read_text()), without_digests(out)
    (copy / "generation_config.json").write_text(json.dumps(source | {"top_k": 7}))
    assert qsvd.load(tmp_path / "out").generation_config.top_k == 7
    (tmp_path / "out" / "generation_config.json").unlink()
    assert qsvd.load(tmp_path / "out").generation_config.eos_token_id == source["eos_token_id"] == 2


@pytest.mark.filterwarnings(PEFT_READS_AN_OLD_NAME)
def test_the_logits_are_those_of_bitsandbytes_and_peft(out, exact):
    stock = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert_as_exact_as_float32(in_float32(stock), exact)
    assert_as_exact_as_float32(qsvd.load(out), exact)


def test_a_tied_head_is_one_tensor_with_the_embedding_and_an_untied_one_is_not(tmp_path, out):
    tied = qsvd.load(split_checkpoint(tmp_path, tie_word_embeddings=True))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert qsvd.load(out).lm_head.weight is not qsvd.load(out).model.embed_tokens.weight


@pytest.fixture(scope="module", params=["T5ForConditionalGeneration", "BertForMaskedLM"])
def other_family(request, tmp_path_factory):
    """Another class of models, and a split model of it."""
    return request.param, split_checkpoint(tmp_path_factory.mktemp("family"), request.param)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_all_but_adapters_and_residuals_have_the_dtype_that_transformers_gives_them(other_family, dtype):
    """T5's second feed-forward weight stays float32 in float16."""
    architecture, out = other_family
    model = qsvd.load(out, dtype=dtype)
    plain = getattr(transformers, architecture).from_pretrained(out.parent / "source", dtype=dtype)
    theirs = {name: tensor.dtype for name, tensor in (*plain.named_parameters(), *plain.named_buffers())}
    ours = {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    assert {name: ours[name] for name in theirs.keys() & ours.keys()} == {
        n: theirs[n] for n in theirs.keys() & ours.keys()
    }
    assert theirs.keys() - ours.keys() == {f"{path}.weight" for path in modules_of(out)}
    assert {dtype for name, dtype in ours.items() if ".adapter." in name} == {torch.float32}
    assert model.config.dtype == model.dtype == dtype
    assert torch.isfinite(outputs(model, architecture)).all()


def test_adapters_may_be_bfloat16(out, exact):
    model = qsvd.load(out, options=qsvd.AdapterOptions(dtype="bfloat16"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    assert_as_exact_as_float32(model, exact)  # the stored factors are bfloat16


def test_a_folder_is_also_known_by_its_path_as_text_and_a_device_by_its_name(out):
    assert torch.equal(outputs(qsvd.load(str(out), device="cpu")), outputs(qsvd.load(out)))
    assert {p.device.type for p in qsvd.load(out, device=torch.device("cpu")).parameters()} == {"cpu"}


def test_each_module_knows_its_weights_name_in_the_files(out):
    names = {module.name for module in qsvd.load(out).modules() if isinstance(module, SplitLinear)}
    assert names == set(json.loads((out / "qsvd.json").read_text())["weights"])


def test_a_trainer_that_looks_for_a_reference_model_finds_the_whole_quantized_model(out):
    assert qsvd.load(out).config.name_or_path == str(out.resolve())


def test_a_training_step_moves_the_adapters_alone(out):
    model = qsvd.load(out, options=qsvd.AdapterOptions("edora"))
    model.train()
    model.activation_checkpointing_enable()
    before = {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    optimizer.step()
    moved = {
        name
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if not torch.equal(tensor, before[name])
    }
    assert moved == {name for name in before if name.endswith((".adapter.core", ".adapter.magnitude"))}
    assert model(input_ids=IDS, labels=IDS).loss < loss


def test_a_folder_that_is_no_result_is_refused(out):
    with pytest.raises(ValueError, match=r"source is not a quantized model: it has no qsvd\.json"):
        qsvd.load(out.parent / "source")


def test_a_weight_that_the_model_has_no_place_for_is_refused(out, tmp_path):
    def one_layer(file, fields):
        if file == "config.json":
            fields["num_hidden_layers"] = 1

    said = r"LlamaForCausalLM has no layers for 7 quantized weights: model\.layers\.1\..* and 2 more$"
    with pytest.raises(ValueError, match=said):
        qsvd.load(changed(out, tmp_path / "out", one_layer))


def test_tensors_that_the_base_lacks_are_named(out, tmp_path):
    def three_layers(file, fields):
        if file == "config.json":
            fields["num_hidden_layers"] = 3

    names = r"model\.layers\.2\.input_layernorm\.weight, .* and 4 more"
    said = rf"the quantized model lacks 9 tensors of LlamaForCausalLM: {names}$"
    with pytest.raises(ValueError, match=said):
        qsvd.load(changed(out, tmp_path / "out", three_layers))


def test_a_split_weight_of_another_kind_of_module_is_refused(out, monkeypatch):
    """As if another version of transformers had other layers there."""
    monkeypatch.setattr("qsvd.files.check.is_linear", lambda module: module.weight.shape[0] != 64)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no linear layer at model\.layers\.0\.self_attn"):
        qsvd.load(out)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (qsvd.AdapterOptions("dore"), "method 'dore' is not one of pissa, lora, edora"),
        (qsvd.AdapterOptions(dtype="float64"), "adapter dtype 'float64' is not one of"),
        (qsvd.AdapterOptions(rank=3), r"layers\.0\..*: rank 3 is not the stored rank 4"),
    ],
)
def test_options_that_do_not_fit_are_refused(out, options, said):
    with pytest.raises(ValueError, match=said):
        qsvd.load(out, options=options)
