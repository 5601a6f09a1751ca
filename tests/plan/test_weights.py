"""The plan against models that transformers builds for real, and against counts made by hand."""

import fnmatch

import pytest
import torch
import transformers
from torch import nn

from qsvd.plan.allocation import usual_codec
from qsvd.plan.weights import Source, coverage, plan_model, role_of
from qsvd.records import Coverage, LeftTensors
from tests.checkpoints import tiny_config, tiny_model

LLAMA_BLOCK = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
BERT_BLOCK = {
    "attention.self.query": "q",
    "attention.self.key": "k",
    "attention.self.value": "v",
    "attention.output.dense": "o",
    "intermediate.dense": "up",
    "output.dense": "down",
}
BLOCKS = {  # class -> (path of the blocks, linear layers of one block and their roles, linear layers elsewhere)
    "LlamaForCausalLM": ("model.layers", LLAMA_BLOCK, {"lm_head"}),
    "MistralForCausalLM": ("model.layers", LLAMA_BLOCK, {"lm_head"}),
    "Qwen2ForCausalLM": ("model.layers", LLAMA_BLOCK, {"lm_head"}),
    "Qwen3ForCausalLM": ("model.layers", LLAMA_BLOCK, {"lm_head"}),
    "GemmaForCausalLM": ("model.layers", LLAMA_BLOCK, {"lm_head"}),
    "PhiForCausalLM": (
        "model.layers",
        {f"self_attn.{name}_proj": name for name in "qkv"}
        | {"self_attn.dense": "o", "mlp.fc1": "up", "mlp.fc2": "down"},
        {"lm_head"},
    ),
    "Phi3ForCausalLM": (
        "model.layers",
        {"self_attn.qkv_proj": "other", "self_attn.o_proj": "o", "mlp.gate_up_proj": "other", "mlp.down_proj": "down"},
        {"lm_head"},
    ),
    "GPTNeoXForCausalLM": (
        "gpt_neox.layers",
        {
            "attention.query_key_value": "other",
            "attention.dense": "o",
            "mlp.dense_h_to_4h": "up",
            "mlp.dense_4h_to_h": "down",
        },
        {"lm_head"},
    ),
    "BertModel": ("encoder.layer", BERT_BLOCK, {"pooler.dense"}),
    "BertForMaskedLM": (
        "bert.encoder.layer",
        BERT_BLOCK,
        {"cls.predictions.transform.dense", "cls.predictions.decoder"},
    ),
    "RobertaForMaskedLM": ("roberta.encoder.layer", BERT_BLOCK, {"lm_head.dense", "lm_head.decoder"}),
    "OPTForCausalLM": (
        "model.decoder.layers",
        {f"self_attn.{name}_proj": name for name in "qkv"} | {"self_attn.out_proj": "o", "fc1": "up", "fc2": "down"},
        {"lm_head", "model.decoder.project_in", "model.decoder.project_out"},
    ),
}


@pytest.mark.parametrize("architecture", BLOCKS)
def test_every_linear_of_the_blocks_is_split_and_no_other(architecture):
    blocks, inside, outside = BLOCKS[architecture]
    plan = plan_model(tiny_config(architecture))
    assert plan.architecture == architecture
    found = {(spec.module, spec.role, spec.layer) for spec in plan.weights}
    assert found == {(f"{blocks}.{i}.{name}", role, i) for i in (0, 1) for name, role in inside.items()}
    assert len(plan.weights) == len(found)
    assert set(plan.left_linears) == outside


@pytest.mark.parametrize("architecture", BLOCKS)
def test_names_and_shapes_are_those_of_the_real_model(architecture):
    plan = plan_model(tiny_config(architecture))
    stored = tiny_model(architecture).state_dict()
    assert plan.shapes == {name: tuple(tensor.shape) for name, tensor in stored.items()}
    order = [name for name in stored if name in {spec.name for spec in plan.weights}]
    assert [spec.name for spec in plan.weights] == order
    assert all(spec.shape == tuple(stored[spec.name].shape) for spec in plan.weights)
    assert all(spec.name == f"{spec.module}.weight" for spec in plan.weights)


@pytest.mark.parametrize("architecture", BLOCKS)
def test_coverage_adds_up_to_the_parameters_of_the_real_model(architecture):
    report = coverage(plan_model(tiny_config(architecture)))
    model = tiny_model(architecture)
    assert report.elements == sum(parameter.numel() for parameter in model.parameters())  # shared ones come once
    assert report.elements == report.elements_split + sum(tensors.elements for tensors in report.left)
    assert report.share == report.elements_split / report.elements
    sizes = [tensors.elements for tensors in report.left]
    assert sizes == sorted(sizes, reverse=True)


def test_a_70b_llama_is_planned_without_memory_to_the_published_parameter_count():
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        architectures=["LlamaForCausalLM"],
    )
    report = coverage(plan_model(config))
    one_block = 2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 28672 * 8192
    assert (report.weights, report.elements_split) == (560, 80 * one_block)
    assert report.elements == 70_553_706_496  # Llama 3 70B


def test_left_tensors_are_grouped_over_the_blocks():
    assert coverage(plan_model(tiny_config("LlamaForCausalLM"))) == Coverage(
        weights=14,
        elements_split=2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64),
        elements=2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64) + 2 * 96 * 64 + 5 * 64,
        left=(
            LeftTensors("model.embed_tokens.weight", 1, 96 * 64),
            LeftTensors("lm_head.weight", 1, 96 * 64),
            LeftTensors("model.layers.*.input_layernorm.weight", 2, 128),
            LeftTensors("model.layers.*.post_attention_layernorm.weight", 2, 128),
            LeftTensors("model.norm.weight", 1, 64),
        ),
    )


def test_planning_leaves_the_config_as_it_was():
    config = tiny_config("LlamaForCausalLM")
    before = config.to_dict() | {"attention": config._attn_implementation_internal}
    plan_model(config)
    assert config.to_dict() | {"attention": config._attn_implementation_internal} == before


def test_include_and_exclude_select_by_path():
    patterns = {"include": ["*.self_attn.*", "*.mlp.up_proj"], "exclude": ["*.layers.1.*", "*.k_proj"]}
    plan = plan_model(tiny_config("LlamaForCausalLM"), **patterns)
    names = ["self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj"]
    assert [spec.module for spec in plan.weights] == [f"model.layers.0.{name}" for name in names]
    linears = {path for path, module in tiny_model("LlamaForCausalLM").named_modules() if isinstance(module, nn.Linear)}
    assert set(plan.left_linears) == linears - {spec.module for spec in plan.weights}


@pytest.mark.parametrize("side", ["include", "exclude"])
def test_patterns_that_match_nothing_are_all_named(side):
    patterns = {side: ["*.q_proj", "*.query", "lm_head"]}
    with pytest.raises(
        ValueError, match=r"no linear layer in the blocks matches '\*\.query', 'lm_head'; patterns"
    ) as error:
        plan_model(tiny_config("LlamaForCausalLM"), **patterns)
    assert "model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj" in str(error.value)


def test_excluding_everything_is_refused():
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no linear layer inside repeated blocks left to split"):
        plan_model(tiny_config("LlamaForCausalLM"), exclude=["*"])


def test_the_transposed_weights_of_gpt2_are_split_as_out_times_in():
    plan = plan_model(tiny_config("GPT2LMHeadModel"))
    stored = tiny_model("GPT2LMHeadModel").state_dict()
    assert len(plan.weights) == 8
    assert all(spec.shape == tuple(reversed(stored[spec.name].shape)) for spec in plan.weights)
    assert all(spec.sources == (Source(spec.name, is_transposed=True),) for spec in plan.weights)


@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "Qwen2MoeForCausalLM", "GptOssForCausalLM"])
def test_every_expert_of_a_stack_is_a_weight_unless_the_stack_is_excluded(architecture):
    config = tiny_config(architecture)
    experts = [spec for spec in plan_model(config).weights if spec.stack]
    assert [spec.module for spec in experts[:5]] == [
        *(f"model.layers.0.mlp.experts.gate_up_proj.{number}" for number in range(4)),
        "model.layers.0.mlp.experts.down_proj.0",
    ]
    inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    assert {(spec.role, spec.shape) for spec in experts} == {
        ("expert up", (2 * inner, config.hidden_size)),
        ("expert down", (config.hidden_size, inner)),
    }
    assert coverage(plan_model(config)).share > 0.8
    plan = plan_model(config, exclude=["*.experts.*"])
    assert not fnmatch.filter([spec.module for spec in plan.weights], "*.experts*")
    assert any(tensors.pattern == "model.layers.*.mlp.experts.gate_up_proj" for tensors in coverage(plan).left)


def test_subclasses_of_linear_that_bitsandbytes_passes_over_are_split_in_our_layout():
    plan = plan_model(tiny_config("FalconForCausalLM"))
    assert len(plan.weights) == 8
    assert not any(spec.is_plain for spec in plan.weights)
    assert usual_codec(plan.weights, double_quant=True).name == "nf4-64-8x256"


def test_layers_that_transformers_keeps_in_float32_are_left():
    plan = plan_model(tiny_config("T5ForConditionalGeneration"))
    left = fnmatch.filter(plan.left_linears, "*.DenseReluDense.wo")
    assert len(left) == 4
    assert {spec.role for spec in plan.weights} == {"q", "k", "v", "o", "up"}


def test_a_list_of_heads_is_not_a_block():
    plan = plan_model(tiny_config("MusicgenForCausalLM"))
    assert plan.left_linears == ("lm_heads.0", "lm_heads.1")
    assert {spec.role for spec in plan.weights} == {"q", "k", "v", "o", "up", "down"}


def test_tied_tensors_are_known():
    tied = plan_model(tiny_config("GemmaForCausalLM")).tied
    assert tied == {"lm_head.weight": "model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("config", "built"),
    [(tiny_config("LlamaForCausalLM"), "LlamaForCausalLM"), (tiny_config("ViTModel"), "ViTModel")],
)
@pytest.mark.parametrize("named", [None, ["OurOwnModel"]])
def test_without_a_known_class_the_auto_classes_choose(config, built, named):
    config.architectures = named
    assert plan_model(config).architecture == built


def test_a_config_that_no_class_takes_is_refused():
    class Alien(transformers.PreTrainedConfig):
        model_type = "alien"

    with pytest.raises(
        ValueError,
        match=r"cannot build AlienLM of .* \('alien'\): Unrecognized .*; models that bring",
    ):
        plan_model(Alien(architectures=["AlienLM"]))


def test_a_config_with_impossible_values_is_refused():
    config = tiny_config("BertModel", num_attention_heads=5)
    with pytest.raises(ValueError, match=r"cannot build BertModel .* not a multiple of the number of attention"):
        plan_model(config)


def test_no_tensor_of_the_plan_takes_memory(monkeypatch):
    devices = set()
    real = nn.Linear.__init__

    def watched(self, *args, **options):
        real(self, *args, **options)
        devices.add(self.weight.device)

    monkeypatch.setattr(nn.Linear, "__init__", watched)
    plan_model(tiny_config("LlamaForCausalLM"))
    assert devices == {torch.device("meta")}


@pytest.mark.parametrize(
    ("module", "role"),
    [
        ("transformer.layer.0.attention.q_lin", "q"),  # DistilBERT
        ("transformer.layer.0.attention.out_lin", "o"),
        ("transformer.layer.0.ffn.lin2", "down"),
        ("encoder.layer.3.attention.self.query_proj", "q"),  # DeBERTa
        ("decoder.block.0.layer.1.EncDecAttention.o", "o"),  # T5
        ("decoder.block.0.layer.2.DenseReluDense.wi_0", "gate"),
        ("decoder.block.0.layer.2.DenseReluDense.wo", "down"),
        ("transformer.h.0.self_attention.dense", "o"),  # BLOOM
        ("transformer.blocks.0.attn.Wqkv", "other"),  # MPT
        ("transformer.h.0.attn.c_proj", "o"),
        ("transformer.h.0.mlp.c_proj", "down"),
        ("model.layers.0.mlp.experts.3.w2", "down"),
        ("model.layers.0.mlp.gate", "other"),  # a router
        ("model.layers.0.dense", "other"),
    ],
)
def test_roles_of_further_families(module, role):
    assert role_of(module) == role
