"""Bases of qsvd's own method opened by plain transformers, against the same models with dense weights.

The dense weights are decoded by definition (packed_files.py); transformers, PEFT and autograd do the rest. Roundoff:
the two compute the same sums of the same numbers, but for nested scales, whose last bits differ; what that does to a
logit or a gradient was measured to be below 4e-6 of the largest, and CLOSE is ten times that.
"""

import copy
import json
import re

import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from qsvd.adapters.packed_linear import PackedLinear
from qsvd.adapters.quantizer import PackedConfig, PackedQuantizer
from tests.adapters import packed_files
from tests.checkpoints import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT 0.21 asks for it
CLOSE = 4e-5
TOKENS = torch.tensor([[5, 17, 3, 88, 41, 2, 60], [9, 9, 70, 1, 33, 12, 4]])
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A language model of two layers, every kind of codec in it, and the dense one; tests only read the folder."""
    folder = tmp_path_factory.mktemp("base")
    model = tiny_model("LlamaForCausalLM", pad_token_id=0)
    dense, quantization = packed_files.write_packed(folder, model, packed_files.block_linears(model))
    assert set(quantization["codecs"]) == set(packed_files.CODECS)
    return folder, dense


@pytest.fixture
def copied(base, tmp_path):
    """One to break."""
    for file in base[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def opened(folder, auto=AutoModelForCausalLM, **options):
    return auto.from_pretrained(folder, **({"dtype": torch.float32} | options))


def assert_close(found, wanted):
    assert (found.float() - wanted.float()).abs().max() <= CLOSE * wanted.float().abs().max()


def same_files(one, other):
    """Whether two folders hold the same tensors, to the bit."""
    first, second = ({}, {})
    for folder, tensors in ((one, first), (other, second)):
        for file in folder.glob("*.safetensors"):
            tensors |= load_file(file)
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]) for name, tensor in first.items()
    )


def number_packed(model):
    return sum(isinstance(module, PackedLinear) for module in model.modules())


@torch.no_grad()
def test_logits_and_generated_tokens_are_the_dense_models(base):
    folder, dense = base
    model, loading = opened(folder, output_loading_info=True)
    assert number_packed(model) == 14
    assert not any(loading.values())
    assert model.is_quantized
    assert_close(model(TOKENS).logits, dense(TOKENS).logits)
    generate = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(TOKENS)}
    assert torch.equal(model.generate(TOKENS, **generate), dense.generate(TOKENS, **generate))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "auto"])
def test_in_every_dtype_codes_and_scales_are_those_of_the_files(base, dtype):
    model, files = opened(base[0], dtype=dtype), load_file(base[0] / "model.safetensors")
    assert model.dtype == (torch.bfloat16 if dtype == "auto" else dtype)
    for name, tensor in model.state_dict().items():
        is_part = isinstance(model.get_submodule(name.rpartition(".")[0]), PackedLinear)
        assert tensor.dtype == (files[name].dtype if is_part else model.dtype)
        assert torch.equal(tensor, files[name].to(tensor.dtype))
    assert model(TOKENS).logits.dtype == model.dtype


@torch.no_grad()
def test_in_bfloat16_the_logits_are_those_of_the_rounded_dense_weights(tmp_path):
    """With scales that are stored, not nested, to the bit."""
    model = tiny_model("LlamaForCausalLM")
    plain = [codec for codec in packed_files.CODECS if "x" not in codec]
    dense, _ = packed_files.write_packed(tmp_path / "packed", model, packed_files.block_linears(model), codecs=plain)
    dense.save_pretrained(tmp_path / "dense")
    found, wanted = (opened(tmp_path / name, dtype=torch.bfloat16) for name in ("packed", "dense"))
    assert torch.equal(found(TOKENS).logits, wanted(TOKENS).logits)


@torch.no_grad()
@pytest.mark.parametrize("shard", ["1GB", "10KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_opened_again_it_is_the_same_to_the_bit(base, tmp_path, shard, dtype):
    model = opened(base[0], dtype=dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "10KB")
    assert dtype != torch.bfloat16 or same_files(tmp_path, base[0])
    configs = [json.loads((folder / "config.json").read_text()) for folder in (base[0], tmp_path)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert torch.equal(opened(tmp_path, dtype=dtype)(TOKENS).logits, model(TOKENS).logits)


@torch.no_grad()
def test_the_bare_model_and_a_classifier_open_from_the_same_files(base, tmp_path):
    folder, dense = base
    bare, classifier = opened(folder, AutoModel), opened(folder, AutoModelForSequenceClassification)
    wanted = dense.model(TOKENS).last_hidden_state
    for number, (model, inner) in enumerate(((bare, bare), (classifier, classifier.model))):
        assert number_packed(model) == 14
        assert_close(inner(TOKENS).last_hidden_state, wanted)
        model.save_pretrained(tmp_path / str(number))
        again = opened(tmp_path / str(number), type(model))
        assert torch.equal(again(TOKENS)[0], model(TOKENS)[0])
    whole, loading = opened(tmp_path / "0", output_loading_info=True)
    assert (number_packed(whole), loading["missing_keys"]) == (14, {"lm_head.weight"})


@torch.no_grad()
def test_tied_embeddings_stay_tied(tmp_path):
    model = tiny_model("LlamaForCausalLM", tie_word_embeddings=True)
    dense, _ = packed_files.write_packed(tmp_path / "a", model, packed_files.block_linears(model))
    found = opened(tmp_path / "a")
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert_close(found(TOKENS).logits, dense(TOKENS).logits)
    opened(tmp_path / "a", dtype=torch.bfloat16).save_pretrained(tmp_path / "b")
    assert same_files(tmp_path / "a", tmp_path / "b")


@torch.no_grad()
def test_an_encoder_with_biases_opens_whole_bare_and_as_a_classifier(tmp_path):
    """The masked head has a packed layer too, of which the bare model and the classifier know nothing."""
    model = tiny_model("BertForMaskedLM")
    paths = [*packed_files.block_linears(model), "cls.predictions.transform.dense"]
    dense, _ = packed_files.write_packed(tmp_path / "a", model, paths)
    whole = opened(tmp_path / "a", AutoModelForMaskedLM)
    assert number_packed(whole) == 13
    assert {p.dtype for p in whole.parameters()} == {torch.uint8, torch.float32}
    assert_close(whole(TOKENS).logits, dense(TOKENS).logits)
    wanted = dense.bert(TOKENS).last_hidden_state
    for auto in (AutoModel, AutoModelForSequenceClassification):
        part = opened(tmp_path / "a", auto)
        assert number_packed(part) == 12
        assert_close(getattr(part, "bert", part)(TOKENS).last_hidden_state, wanted)
        part.save_pretrained(tmp_path / "b")
        assert torch.equal(opened(tmp_path / "b", auto)(TOKENS)[0], part(TOKENS)[0])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_that_looks_at_its_weights_dtype_and_keeps_some_in_float32(tmp_path, dtype):
    """T5 casts what goes into one layer to the dtype of its weight, and wants that layer in float32, not in float16."""
    model = tiny_model("T5ForConditionalGeneration")
    dense, _ = packed_files.write_packed(tmp_path / "a", model, packed_files.block_linears(model), dtype=dtype)
    found = opened(tmp_path / "a", transformers.T5ForConditionalGeneration, dtype=dtype)
    inputs = {"input_ids": TOKENS, "decoder_input_ids": TOKENS}
    slack = 1 if dtype == torch.float32 else 2.0**-11 / CLOSE * 4  # a few roundings to float16
    wanted = dense(**inputs).logits
    assert (found(**inputs).logits.float() - wanted).abs().max() <= slack * CLOSE * wanted.abs().max()
    found.save_pretrained(tmp_path / "b")
    assert same_files(tmp_path / "a", tmp_path / "b")


@torch.no_grad()
def test_a_model_whose_files_spell_its_modules_otherwise(tmp_path):
    """transformers renames the tensors as it loads them, scales with their weights."""
    model = tiny_model("ViTModel")
    model.save_pretrained(tmp_path / "names")
    paths = packed_files.block_linears(model)
    pixels = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    renamed = {"attention.q_proj": "attention.attention.query", "mlp.fc1": "intermediate.dense"}
    spelling = {
        path: path.replace("layers", "encoder.layer").replace(ours, theirs)
        for path in paths
        for ours, theirs in renamed.items()
        if path.endswith(ours)
    }
    assert len(spelling) == 4
    assert {f"{path}.weight" for path in spelling.values()} <= load_file(tmp_path / "names/model.safetensors").keys()
    dense, _ = packed_files.write_packed(tmp_path / "a", model, list(spelling), spelling=spelling)
    found = opened(tmp_path / "a", AutoModel)
    assert number_packed(found) == 4
    assert_close(found(pixels)[0], dense(pixels)[0])
    opened(tmp_path / "a", AutoModel, dtype=torch.bfloat16).save_pretrained(tmp_path / "b")
    assert same_files(tmp_path / "a", tmp_path / "b")


@torch.no_grad()
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_a_device_map_places_it(base, tmp_path, where):
    names = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    places = {name: where if name == "model.layers.1" else "cpu" for name in names}
    model = opened(base[0], device_map=places, offload_folder=tmp_path)
    assert torch.equal(model(TOKENS).logits, opened(base[0])(TOKENS).logits)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_dequantized_it_is_an_ordinary_model(base, tmp_path, dtype):
    model = opened(base[0], dtype=torch.bfloat16)
    wanted = model(TOKENS).logits
    plain = model.dequantize(dtype)
    assert plain is model
    assert number_packed(plain) == 0
    assert {p.dtype for p in plain.parameters()} == {dtype or torch.bfloat16}
    if dtype is None:
        assert torch.equal(plain(TOKENS).logits, wanted)
    else:
        assert_close(plain(TOKENS).logits, base[1](TOKENS).logits)
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(TOKENS).logits, plain(TOKENS).logits)


def test_after_a_save_or_a_cast_it_dequantizes_to_the_dtype_it_has(base, tmp_path):
    model = opened(base[0], dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert {p.dtype for p in model.to(torch.float32).dequantize().parameters()} == {torch.float32}
    model = opened(base[0], dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert {p.dtype for p in model.dequantize().parameters()} == {torch.bfloat16}


def with_lora(model, **options):
    """LoRA with the same random factors on every model."""
    torch.manual_seed(0)
    config = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return get_peft_model(model, LoraConfig(**config | options))


def test_peft_trains_lora_beside_it_and_saves_it(base, tmp_path):
    """Gradients of all factors are autograd's through the dense model."""
    gradients = []
    for model in (opened(base[0]), copy.deepcopy(base[1])):
        lora = with_lora(model)
        lora(TOKENS, labels=TOKENS).loss.backward()
        gradients.append({name: p.grad for name, p in lora.named_parameters() if p.requires_grad})
    assert len(gradients[0]) == 28
    for name, wanted in gradients[1].items():
        assert_close(gradients[0][name], wanted)
    lora = with_lora(opened(base[0]))
    lora.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(opened(base[0]), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, lora(TOKENS).logits)


MERGES = {
    "merge_and_unload": lambda lora: lora.merge_and_unload(),
    "safe merge": lambda lora: lora.merge_and_unload(safe_merge=True),
    "merge_adapter": lambda lora: lora.merge_adapter(),
}


@pytest.mark.parametrize("merge", MERGES)
def test_peft_cannot_merge_into_codes_and_changes_nothing_when_it_tries(base, merge):
    model = opened(base[0])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lora = with_lora(model)
    with torch.no_grad():
        wanted = lora(TOKENS).logits
    with pytest.raises(ValueError, match=r"codes, which cannot be added or cast.*call dequantize\(\).*`qsvd export`"):
        MERGES[merge](lora)
    left = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(left[name], tensor) for name, tensor in before.items())
    with torch.no_grad():
        assert torch.equal(lora(TOKENS).logits, wanted)


@pytest.mark.parametrize("config", [LoraConfig(target_modules=["q_proj"], use_dora=True), "ia3"])
def test_adapters_that_need_the_weights_numbers_say_so(base, config):
    """DoRA its norms, before the first step; IA3 the weight, when it is merged."""
    if config == "ia3":
        config = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    with pytest.raises(ValueError, match="codes, which cannot be added or cast"):
        get_peft_model(opened(base[0]), config).merge_and_unload()


@torch.no_grad()
def test_dequantized_below_its_adapter_it_merges(base, tmp_path):
    lora = with_lora(opened(base[0]))
    wanted = lora(TOKENS).logits
    lora.dequantize()
    assert torch.equal(lora(TOKENS).logits, wanted)
    merged = lora.merge_and_unload()
    assert_close(merged(TOKENS).logits, wanted)
    merged.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(TOKENS).logits, merged(TOKENS).logits)


def test_transformers_trainer_trains_an_adapter_beside_it_as_beside_the_dense_model(base, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    losses = []
    for model in (opened(base[0]), copy.deepcopy(base[1])):
        options = {"max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1, "seed": 0, "save_strategy": "no"}
        options |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 2}
        settings = transformers.TrainingArguments(str(tmp_path), **options)
        trainer = transformers.Trainer(with_lora(model), settings, train_dataset=rows)
        trainer.train()
        losses.append(torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
    assert len(losses[0]) == 3
    assert losses[0][2] < losses[0][0]
    assert_close(losses[0], losses[1])
    with pytest.raises(ValueError, match="Please attach trainable adapters"):
        transformers.Trainer(opened(base[0]), settings)


def refused(folder, sentence, **changes):
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    packed_files.edit_config(folder, quantization_config=config | changes)
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        opened(folder)


def test_a_config_that_cannot_be_used_is_refused_with_all_that_is_wrong(copied):
    codecs = {"nf5-64-bf16": ["a"], "nf4+dq": ["b"], "nf3-64-bf16": ["q", "q"]}
    wrong = (
        r"the quantization_config of method 'qsvd' cannot be used: dtype 'int8' is not one of float32, bfloat16, "
        r"float16; "
        r"codec 'nf5-64-bf16': .* a codec is nf4 or .*; codec 'nf4\+dq' belongs to the quantization method "
        r"bitsandbytes; it has two codecs for q"
    )
    refused(copied, wrong, codecs=codecs, dtype="int8")


def test_a_config_with_other_keys_is_refused(copied):
    sentence = "a quantization_config of method 'qsvd' has codecs, dtype and quant_method, not "
    refused(copied, sentence + "codecs, dtype, quant_method, rank", rank=3)
    packed_files.edit_config(copied, quantization_config={"quant_method": "qsvd", "codecs": {}})
    with pytest.raises(ValueError, match=f"^{sentence}codecs, quant_method$"):
        opened(copied)


def test_paths_that_the_model_has_not_are_refused_all_at_once(copied):
    paths = [Q_PROJ, "model.layers.2.self_attn.q_proj", "model.norm", "model.layers.0.mlp"]
    sentence = (
        r"the quantization_config names 3 modules that are neither embeddings nor linear layers of a LlamaForCausalLM "
        r"with a weight of their own: model\.layers\.2\.self_attn\.q_proj, model\.norm, model\.layers\.0\.mlp"
    )
    refused(copied, sentence, codecs={"nf3-64-bf16": paths})


def test_a_tied_head_cannot_be_packed(tmp_path):
    tiny_model("LlamaForCausalLM", tie_word_embeddings=True).save_pretrained(tmp_path)
    packed_files.edit_config(tmp_path, quantization_config={"quant_method": "qsvd", "codecs": {}, "dtype": "float32"})
    refused(tmp_path, ".*with a weight of their own: lm_head", codecs={"nf3-64-bf16": ["lm_head"]})


def test_files_that_lack_tensors_are_refused_all_named(copied):
    files = load_file(copied / "model.safetensors")
    lost = [f"{Q_PROJ}.absmax", f"{Q_PROJ}.offset", "model.layers.1.mlp.down_proj.weight"]
    save_file({k: v for k, v in files.items() if k not in lost}, copied / "model.safetensors", {"format": "pt"})
    found = re.escape(", ".join(sorted(lost)))
    with pytest.raises(ValueError, match=f"lacks 3 tensors of packed layers: {found}; download or quantize it again$"):
        opened(copied)


def test_a_lost_bias_of_a_packed_layer_is_refused(tmp_path):
    model = tiny_model("BertModel")
    packed_files.write_packed(tmp_path, model, packed_files.block_linears(model))
    files = load_file(tmp_path / "model.safetensors")
    del files["encoder.layer.1.output.dense.bias"]
    save_file(files, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors of packed layers: encoder\.layer\.1\.output\.dense\.bias;"):
        opened(tmp_path, AutoModel)


def test_a_16_bit_model_is_not_quantized_while_it_is_loaded(tmp_path):
    tiny_model("LlamaForCausalLM").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not quantize by the method 'qsvd'.*`qsvd quantize MODEL --out OUT`"):
        opened(tmp_path, quantization_config=PackedConfig({"nf3-64-bf16": [Q_PROJ]}, "float32"))


def test_the_method_is_registered_by_its_import(base):
    assert AUTO_QUANTIZER_MAPPING["qsvd"] is PackedQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["qsvd"] is PackedConfig
    assert isinstance(opened(base[0]).config.quantization_config, PackedConfig)
    assert isinstance(opened(base[0]).get_submodule(Q_PROJ), nn.Linear)
