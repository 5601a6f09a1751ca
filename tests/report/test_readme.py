"""OUT/README.md: commands that can be copied; that they work is test_loads_without_qsvd's claim."""

import ast
import json
import re
import shlex
from dataclasses import replace

import pytest
import transformers

from qsvd.records import Coverage
from qsvd.report import readme as made
from qsvd.report.header import ReportHeader
from tests.checkpoints import FAMILIES, tiny_config

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what `vllm serve --max-lora-rank` accepts
REFUSED = {"GPT2LMHeadModel", "MixtralForCausalLM", "Qwen2MoeForCausalLM", "FalconForCausalLM"}


QUANTIZATION = {"quant_method": "bitsandbytes", "bnb_4bit_quant_storage": "int8", "llm_int8_skip_modules": ["lm_head"]}


def readme(head, folder, architecture, left=("lm_head",), quantized=("model.layers.0.self_attn.q_proj",), width=64):
    widths = dict.fromkeys(quantized, width)
    return made.readme(head, folder, architecture, QUANTIZATION | {"llm_int8_skip_modules": [*left]}, widths)


def header(rank=16):
    coverage = Coverage(14, 18432, 24736, ())
    return ReportHeader("some/folder/tiny-llama/", "nf4+dq", rank, "svd", 5, "svd", coverage)


def blocks(text):
    """Language and lines of each code block, by the first word of its title."""
    found = re.findall(r"^## (\w+)[^\n]*\n\n```(\w+)\n(.*?)```$", text, flags=re.S | re.M)
    return {title: (language, lines) for title, language, lines in found}


def strings(lines):
    """Every string in some Python lines."""
    return [node.value for node in ast.walk(ast.parse(lines)) if isinstance(node, ast.Constant)]


def test_a_causal_model_has_commands_to_load_train_merge_and_serve():
    found = blocks(readme(header(), "build/out", "LlamaForCausalLM"))
    assert {title: language for title, (language, _) in found.items()} == {
        "Load": "python",
        "Train": "python",
        "Merge": "python",
        "Serve": "sh",
    }
    for title in ("Load", "Train", "Merge"):
        lines = found[title][1]
        assert "LlamaForCausalLM.from_pretrained" in lines
        assert "build/out" in strings(lines)
    assert "is_trainable=True" in found["Train"][1]
    assert "is_trainable" not in found["Load"][1]
    assert "build/out-merged" in strings(found["Merge"][1])


def test_rank_0_has_no_adapter_to_load_train_or_serve():
    text = readme(header(rank=0), "out", "LlamaForCausalLM")
    found = blocks(text)
    assert set(found) == {"Load", "Merge", "Serve"}
    assert not any(word in lines for _, lines in found.values() for word in ("peft", "adapter", "lora"))
    assert "It has no adapter, because the rank is 0" in text


@pytest.mark.parametrize("width", [48, 172, 4304])
@pytest.mark.parametrize("rank", [0, 16])
def test_bitsandbytes_does_not_decode_widths_that_it_may_decode_wrongly(rank, width):
    text = readme(header(rank), "a folder", "LlamaForCausalLM", width=width)
    assert "dequantize" not in text
    assert "merge_and_unload" not in text
    assert blocks(text)["Merge"] == ("sh", "qsvd export 'a folder' --to merged --out 'a folder-merged'\n")
    assert "Such layers here: model.layers.0.self_attn.q_proj.\nUse `qsvd generate`" in text
    ours = replace(header(rank), quantizer="qsvd")
    assert "dequantize()" in readme(ours, "out", "LlamaForCausalLM", width=width), "our decode is right"
    assert "AVX-512" not in readme(header(rank), "out", "LlamaForCausalLM", width=192)


def test_an_encoder_is_not_served():
    found = blocks(readme(header(), "out", "BertModel"))
    assert set(found) == {"Load", "Train", "Merge"}
    assert "BertModel.from_pretrained" in found["Load"][1]


def assert_loads(architecture, config):
    """The class that the README names is the architecture's own, or an Auto class that gives it for its config."""
    lines = blocks(readme(header(), "out", architecture))["Load"][1]
    named = getattr(transformers, re.search(r"= (\w+)\.from_pretrained", lines)[1])
    if named.__name__ != architecture:
        loaded = named._model_mapping.get(config, ())
        assert architecture in [kind.__name__ for kind in (loaded if isinstance(loaded, tuple) else (loaded,))]


@pytest.mark.parametrize("architecture", sorted(FAMILIES.keys() - REFUSED))
def test_the_readme_loads_the_architecture(architecture):
    assert_loads(architecture, type(tiny_config(architecture)))


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("BertForSequenceClassification", "BertConfig"),
        ("BertForTokenClassification", "BertConfig"),
        ("BertForQuestionAnswering", "BertConfig"),
        ("BartForConditionalGeneration", "BartConfig"),
        ("WhisperForConditionalGeneration", "WhisperConfig"),
        ("LlavaForConditionalGeneration", "LlavaConfig"),
        ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig"),
        ("BertLMHeadModel", "BertConfig"),
        ("ViTForImageClassification", "ViTConfig"),
        ("BertForMultipleChoice", "BertConfig"),
    ],
)
def test_the_readme_loads_architectures_with_other_heads(architecture, config):
    assert_loads(architecture, getattr(transformers, config))


@pytest.mark.parametrize("rank", [1, 2, 8, 9, 64, 65, 300, 512])
def test_the_rank_given_to_vllm_is_the_least_that_it_takes(rank):
    serve = blocks(readme(header(rank), "out", "LlamaForCausalLM"))["Serve"][1]
    words = shlex.split(serve.splitlines()[1])
    given = int(words[words.index("--max-lora-rank") + 1])
    assert given == min(allowed for allowed in VLLM_RANKS if allowed >= rank)
    assert json.loads(words[words.index("--lora-modules") + 1]) == {"name": "tiny-llama", "path": "out"}


@pytest.mark.parametrize("folder", ["/data/my results/out", 'odd"name', "back\\slash", "it's"])
def test_a_folder_with_a_space_or_a_quote_is_still_one_path(folder):
    found = blocks(readme(header(), folder, "LlamaForCausalLM"))
    for title in ("Load", "Train", "Merge"):
        assert folder in strings(found[title][1])
    words = shlex.split(found["Serve"][1].partition("\n")[2], comments=True)
    assert words[2] == folder
    assert json.loads(words[words.index("--lora-modules") + 1])["path"] == folder
    assert f"{folder}-merged" in words


def test_the_opening_names_the_model_the_method_and_the_coverage():
    text = readme(header(), "out", "LlamaForCausalLM")
    assert text.startswith("# tiny-llama, quantized by qsvd\n")
    assert "components of rank 16; svd first, up to 5 iterations, ending with svd" in text
    assert "14 layers quantized, 18,432 of 24,736 elements (74.51 %)" in text
    assert text.endswith("\n")


def test_vllm_gets_the_storage_that_it_accepts_and_a_name_that_warns():
    words = shlex.split(blocks(readme(header(), "out", "LlamaForCausalLM"))["Serve"][1].splitlines()[1])
    served = json.loads(words[words.index("--hf-overrides") + 1])["quantization_config"]
    assert served == QUANTIZATION | {"bnb_4bit_quant_storage": "uint8"}
    assert words[words.index("--served-model-name") + 1] == "residual-only"


@pytest.mark.parametrize("rank", [0, 16])
def test_a_joined_layer_that_is_left_in_part_is_not_served_from_the_4_bit_model(rank):
    """vLLM computes q, k and v as one layer, and so gate and up, and would quantize the part that is left."""
    attention, mlp = "model.layers.0.self_attn.", "model.layers.0.mlp."
    parted = readme(header(rank), "out", "LlamaForCausalLM", (f"{mlp}gate_proj", "lm_head"), (f"{mlp}up_proj",))
    assert "out-merged" in parted
    assert "vllm serve out " not in parted
    assert "the 16-bit part of\nmodel.layers.0.mlp.gate_up_proj" in parted
    whole = tuple(f"{attention}{part}_proj" for part in "qkv")
    assert "vllm serve out " in readme(header(rank), "out", "LlamaForCausalLM", whole, (f"{mlp}up_proj",))
