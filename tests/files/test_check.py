"""What a checkpoint lacks or already is; renamed tensors are judged by where transformers loads them."""

import json
from dataclasses import replace

import pytest
import safetensors.torch
import torch
import transformers
from transformers import core_model_loading

from qsvd.files.check import check_complete, check_not_quantized, resolve
from qsvd.files.safetensors import TensorEntry
from qsvd.files.source import open_checkpoint
from qsvd.plan.weights import Source, plan_model
from tests.checkpoints import FAMILIES, SHARED_MODELS, tiny_config, write_checkpoint

REFUSED = {"GPT2LMHeadModel", "MixtralForCausalLM", "Qwen2MoeForCausalLM", "FalconForCausalLM"}


def edit(folder, change):
    """Rewrite the tensors of a checkpoint: `change` takes and returns name -> tensor."""
    path = folder / "model.safetensors"
    safetensors.torch.save_file(change(safetensors.torch.load_file(path)), path, metadata={"format": "pt"})


def checked(folder, **patterns):
    checkpoint = open_checkpoint(str(folder))
    check_not_quantized(checkpoint.config, checkpoint.tensors)
    return checkpoint, check_complete(checkpoint, plan_model(checkpoint.config, **patterns))


def assert_loaded_alike(folder, checkpoint, plan):
    """Every weight to split is the tensor that transformers puts into its module."""
    model = getattr(transformers, plan.architecture).from_pretrained(folder, dtype=torch.bfloat16)
    for spec in plan.weights:
        if spec.stack:
            stored = model.get_parameter(spec.stack)[int(spec.module.rpartition(".")[2])]
            weight = checkpoint.read_weight(spec)
            assert torch.equal(stored if stored.shape == weight.shape else stored.T, weight)
        else:
            assert torch.equal(model.get_submodule(spec.module).weight, checkpoint.read(spec.name))
    state = model.state_dict()
    assert all(torch.equal(state[name], checkpoint.read(stored)) for name, stored in plan.spelling.items())


@pytest.mark.parametrize("architecture", sorted(FAMILIES.keys() - REFUSED))
def test_what_transformers_saves_is_complete_and_found_again(tmp_path, architecture):
    write_checkpoint(tmp_path, architecture)
    checkpoint, plan = checked(tmp_path)
    read = {source.tensor for spec in plan.weights for source in spec.read_from}
    assert {*plan.spelling.values(), *read} == set(checkpoint.tensors)
    assert_loaded_alike(tmp_path, checkpoint, plan)


def test_old_names_are_resolved_as_transformers_does(tmp_path):
    write_checkpoint(tmp_path, "ViTModel")
    _, plan = checked(tmp_path)
    assert plan.weights[0].module == "layers.0.attention.q_proj"
    assert plan.weights[0].name == "encoder.layer.0.attention.attention.query.weight"


def test_the_sources_of_a_weight_are_resolved_as_its_name_is(tmp_path):
    write_checkpoint(tmp_path, "ViTModel")
    checkpoint = open_checkpoint(str(tmp_path))
    plan = plan_model(checkpoint.config)
    halves = [(Source(spec.name, rows=(0, 16)), Source(spec.name, rows=(16, spec.shape[0]))) for spec in plan.weights]
    weights = tuple(replace(spec, sources=parts) for spec, parts in zip(plan.weights, halves, strict=True))
    plan = check_complete(checkpoint, replace(plan, weights=weights))
    first = "encoder.layer.0.attention.attention.query.weight"
    assert plan.weights[0].sources == (Source(first, rows=(0, 16)), Source(first, rows=(16, 64)))
    assert all(torch.equal(checkpoint.read_weight(spec), checkpoint.read(spec.name)) for spec in plan.weights)


def test_legacy_layer_norm_names_are_resolved(tmp_path):
    def age(tensors):
        names = {n: n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta") for n in tensors}
        return {names[name]: tensor for name, tensor in tensors.items()}

    write_checkpoint(tmp_path, "BertModel")
    edit(tmp_path, age)
    checkpoint, plan = checked(tmp_path)
    assert plan.spelling["embeddings.LayerNorm.bias"] == "embeddings.LayerNorm.beta"
    assert_loaded_alike(tmp_path, checkpoint, plan)


def test_names_without_the_prefix_of_the_base_model_are_resolved(tmp_path):
    write_checkpoint(tmp_path)
    edit(tmp_path, lambda tensors: {name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    checkpoint, plan = checked(tmp_path)
    assert plan.weights[0].name == "layers.0.self_attn.q_proj.weight"
    assert plan.weights[0].module == "model.layers.0.self_attn.q_proj"
    assert_loaded_alike(tmp_path, checkpoint, plan)


def test_names_with_the_prefix_of_a_larger_model_are_resolved(tmp_path):
    write_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["LlamaModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint, plan = checked(tmp_path)
    assert plan.weights[0].name == "model.layers.0.self_attn.q_proj.weight"
    assert plan.weights[0].module == "layers.0.self_attn.q_proj"
    assert set(checkpoint.tensors) - set(plan.spelling.values()) == {"lm_head.weight"}
    assert_loaded_alike(tmp_path, checkpoint, plan)


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight"])
def test_one_of_two_tied_tensors_is_enough(tmp_path, kept):
    write_checkpoint(tmp_path, "GemmaForCausalLM")
    edit(tmp_path, lambda t: {kept if n == "model.embed_tokens.weight" else n: tensor for n, tensor in t.items()})
    _, plan = checked(tmp_path)
    assert plan.spelling[kept] == kept


def test_two_tied_tensors_that_are_both_absent_are_missed(tmp_path):
    write_checkpoint(tmp_path, "GemmaForCausalLM")
    edit(tmp_path, lambda t: {name: tensor for name, tensor in t.items() if name != "model.embed_tokens.weight"})
    with pytest.raises(
        ValueError, match=r"2 tensors that config\.json describes .*: model\.embed_tokens\.weight, lm_head"
    ):
        checked(tmp_path)


def test_excluded_experts_may_be_stored_one_by_one(tmp_path):
    write_checkpoint(tmp_path, "MixtralForCausalLM")
    checkpoint, plan = checked(tmp_path, exclude=["*.experts.*"])
    assert any(".experts.3.w1.weight" in name for name in checkpoint.tensors)
    assert plan.unknown == ()
    assert_loaded_alike(tmp_path, checkpoint, plan)


def test_extra_tensors_do_not_matter(tmp_path):
    write_checkpoint(tmp_path, "BertModel")
    edit(tmp_path, lambda tensors: tensors | {"embeddings.position_ids": torch.arange(512)[None]})
    _, plan = checked(tmp_path)
    assert "embeddings.position_ids" not in plan.spelling
    assert plan.unknown == ("embeddings.position_ids",)


def test_all_kinds_of_trouble_are_told_at_once(tmp_path):
    def spoil(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
        name = "model.layers.0.self_attn.q_proj.weight"
        double = "model.layers.0.self_attn.k_proj.weight"
        return tensors | {name: tensors[name].reshape(-1, 1)[:512].clone(), double: tensors[double].double()}

    write_checkpoint(tmp_path)
    edit(tmp_path, spoil)
    with pytest.raises(ValueError, match="is not the LlamaForCausalLM of its config: ") as error:
        checked(tmp_path)
    said = str(error.value)
    assert "2 tensors that config.json describes are in no weight file: model.layers.1.mlp.up_proj.weight, mod" in said
    assert "1 tensors have another shape than in config.json: model.layers.0.self_attn.q_proj.weight is" in said
    assert "[512, 1] instead of [64, 64]" in said
    assert (
        "1 weights to split have another dtype than F32, BF16, F16: model.layers.0.self_attn.k_proj.weight is F64"
        in said
    )


def test_a_weight_that_is_missing_is_not_taken_for_one_of_another_dtype(tmp_path):
    write_checkpoint(tmp_path)
    edit(tmp_path, lambda t: {name: tensor for name, tensor in t.items() if "q_proj" not in name})
    with pytest.raises(
        ValueError, match=r"2 tensors that config\.json describes .*: model\.layers\.0\.self_attn\.q_proj"
    ) as error:
        checked(tmp_path)
    assert "none of" not in str(error.value)


def test_a_left_tensor_may_have_any_dtype(tmp_path):
    write_checkpoint(tmp_path)
    edit(tmp_path, lambda tensors: tensors | {"model.norm.weight": tensors["model.norm.weight"].double()})
    checked(tmp_path)


def test_two_tensors_for_one_place_are_refused():
    plan = plan_model(tiny_config("LlamaForCausalLM"))
    with pytest.raises(
        ValueError, match=r"two tensors for one place .*: model\.norm\.weight and norm\.weight for model"
    ):
        resolve(plan.shapes | {"norm.weight": plan.shapes["model.norm.weight"]}, plan)


FUSED = {f"model.layers.0.self_attn.{name}.weight": (rows, 64) for name, rows in {"q": 64, "k": 32, "v": 32}.items()}


def fusing(*operations):
    """The plan of a model whose first q, k and v are three tensors, and the shapes of its checkpoint."""
    plan = plan_model(tiny_config("Phi3ForCausalLM"))
    patterns = [".q.weight", ".k.weight", ".v.weight"]
    converter = core_model_loading.WeightConverter(patterns, ".qkv_proj.weight", [*operations])
    shapes = {name: shape for name, shape in plan.shapes.items() if name != "model.layers.0.self_attn.qkv_proj.weight"}
    return replace(plan, transforms=(converter, *plan.transforms)), shapes | FUSED


def test_a_weight_that_transformers_joins_on_loading_is_read_from_its_parts():
    plan, shapes = fusing(core_model_loading.Concatenate(0))
    spec = next(spec for spec in resolve(shapes, plan).weights if spec.module == "model.layers.0.self_attn.qkv_proj")
    assert spec.sources == tuple(Source(name) for name in FUSED)


@pytest.mark.parametrize("missing", [[], ["model.layers.0.self_attn.k.weight"]])
def test_weights_that_transformers_computes_in_another_way_are_refused(missing):
    more = [] if missing else [core_model_loading.Interleave(0)]
    plan, shapes = fusing(core_model_loading.Concatenate(0), *more)
    with pytest.raises(
        ValueError, match=r"computes 1 weights of Phi3ForCausalLM .* \(model\.layers\.0\.self_attn\.qkv_proj\)"
    ):
        resolve({name: shape for name, shape in shapes.items() if name not in missing}, plan)


def test_parts_of_other_sizes_than_the_weight_are_refused():
    plan, shapes = fusing(core_model_loading.Concatenate(0))
    for name in FUSED:
        shapes[name] = (shapes[name][0] + 8, 64)
    with pytest.raises(ValueError, match=r"computes 1 weights of Phi3ForCausalLM"):
        resolve(shapes, plan)


def test_resolving_twice_gives_the_same():
    """Some renamings of transformers wait for a first name, and would remember it in the next checkpoint."""
    waiting = core_model_loading.GroupWeightRename(["a_norm", "b_norm"], ["b_norm", "c_norm"])
    plan = replace(plan_model(tiny_config("LlamaForCausalLM")), transforms=(waiting,))
    plan.shapes.update({"b_norm": (1,), "c_norm": (1,)})
    old, new = ["a_norm", "b_norm"], ["b_norm", "c_norm"]
    for names, spelling in [(old, {"b_norm": "a_norm", "c_norm": "b_norm"}), (new, {name: name for name in new})]:
        assert resolve(dict.fromkeys(names, (1,)), plan).spelling == spelling


def entries(**dtypes):
    """Name -> entry; "__" in a keyword stands for "."."""
    named = {name.replace("__", "."): dtype for name, dtype in dtypes.items()}
    return {name: TensorEntry(name, dtype, (8, 8), 64, None, 0, (0, 0)) for name, dtype in named.items()}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (entries(a__weight__absmax="F32"), "1 tensors such as a.weight.absmax are bitsandbytes's"),
        (entries(a__weight__quant_state__bitsandbytes__nf4="U8"), "quant_state.bitsandbytes.nf4 are bitsandbytes's"),
        (entries(a__weight__quant_map="F32"), "a.weight.quant_map are bitsandbytes's"),
        (entries(a__SCB="F32"), "a.SCB are bitsandbytes's"),
        (
            entries(a__qweight="I32", a__qzeros="I32", a__scales="F16", a__g_idx="I32"),
            "1 tensors such as a.g_idx are GPTQ's.",
        ),
        (entries(a__qweight="I32", a__qzeros="I32", a__scales="F16"), "2 tensors such as a.qweight are AWQ's"),
        (entries(a__weight_packed="I32"), "a.weight_packed are compressed-tensors's"),
        (
            entries(a__weight="F8_E4M3", a__weight_scale_inv="F32"),
            "a.weight_scale_inv are an 8-bit format's; 1 weights",
        ),
        (entries(a__weight="U8", b__weight="U8"), "2 weights such as a.weight are U8"),
        (entries(a__weight="I8"), "1 weights such as a.weight are I8"),
        (entries(a__weight="F8_E5M2"), "1 weights such as a.weight are F8_E5M2"),
    ],
)
def test_quantized_tensors_are_recognised(tensors, message):
    config = tiny_config("LlamaForCausalLM")
    with pytest.raises(
        ValueError, match=r"is already quantized: .* give the model that this one was made from$"
    ) as error:
        check_not_quantized(config, entries(b__bias="BF16") | tensors)
    assert message in str(error.value)
    assert ("GPTQ" in message) <= ("AWQ" not in str(error.value))


@pytest.mark.parametrize(
    "quantization",
    [{"quant_method": "bitsandbytes", "load_in_4bit": True}, transformers.BitsAndBytesConfig(load_in_4bit=True)],
)
def test_a_quantization_config_is_evidence_by_itself(quantization):
    config = tiny_config("LlamaForCausalLM", quantization_config=quantization)
    with pytest.raises(ValueError, match=r"config\.json has a quantization_config with quant_method .*bitsandbytes"):
        check_not_quantized(config, entries(a__weight="BF16"))


def test_codes_that_call_themselves_bf16_do_not_pass(tmp_path):
    """peft issue 3742: packed codes stored as bfloat16 look like a weight to whoever asks for the dtype only."""
    write_checkpoint(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    edit(tmp_path, lambda tensors: tensors | {name: torch.ones(64 * 32 // 4, 1, dtype=torch.bfloat16)})
    with pytest.raises(ValueError, match=r"up_proj\.weight is \[512, 1\] instead of \[128, 64\]"):
        checked(tmp_path)


@pytest.mark.parametrize(
    ("name", "weights", "left"), [("minilm-l6", 36, "pooler.dense"), ("stories260K", 35, "lm_head")]
)
def test_real_models_pass(name, weights, left):
    if not (SHARED_MODELS / name).is_dir():
        pytest.skip(f"{name} is not beside this checkout")
    checkpoint, plan = checked(SHARED_MODELS / name)
    assert len(plan.weights) == weights
    assert plan.left_linears == (left,)
    assert all(checkpoint.tensors[spec.name].shape == spec.shape for spec in plan.weights)
