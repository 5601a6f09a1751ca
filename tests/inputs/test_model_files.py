"""Damaged files of a model's folder are refused in one sentence with the path, whatever a library makes of them."""

import json
import shutil
import time

import pytest

from qsvd.cli import run
from qsvd.data.columns import recognise
from qsvd.data.examples import open_tokenizer, stop_ids
from qsvd.data.row_files import Places, Rows
from qsvd.data.tokens import tokenize
from qsvd.demo import __file__ as demo
from qsvd.errors import BadInput
from qsvd.inputs.model_files import generation_config, read_config_json
from tests.data.templates import MARKS
from tests.data.templates import demo as demo_tokenizer

DAMAGES = {
    "empty": b"",
    "binary": bytes(range(256)),
    "list": b"[1, 2]",
    "text": b'"text"',
    "cut": b'{"model_type": "llama", "a": ',
    "deep": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "no UTF-8": b'{"a": "\xff"}',
    "long number": b'{"vocab_size": 1' + b"0" * 5000 + b"}",
}


@pytest.fixture
def model(tmp_path):
    shutil.copytree(demo.replace("__init__.py", "model"), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("content", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_damaged_files_are_named(model, name, content):
    config = read_config_json(model)
    (model / name).write_bytes(content)
    read = {
        "config.json": lambda: read_config_json(model),
        "generation_config.json": lambda: generation_config(model, config),
    }
    with pytest.raises(BadInput, match=rf"^{model / name} is .{{1,300}}$"):  # one line
        read.get(name, lambda: open_tokenizer(model))()


@pytest.mark.parametrize(
    "change",
    [{"model": 3}, {"model": {"type": "BPE", "vocab": [], "merges": 1}}, {"added_tokens": {"a": 1}}, {"decoder": "?"}],
    ids=str,
)
def test_a_tokenizer_of_wrong_types_is_named(model, change):
    file = model / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(BadInput, match=rf"transformers cannot read the tokenizer of {model} \(tokenizer.json, "):
        open_tokenizer(model)


@pytest.mark.parametrize("value", ['["</s>"]', "1e400", "1" + "0" * 30, "true", '{"a": 1}'])
def test_ends_are_numbers(model, value):
    config = read_config_json(model)
    (model / "generation_config.json").write_text(f'{{"eos_token_id": {value}}}')
    for read in (lambda: stop_ids(model), lambda: generation_config(model, config)):
        with pytest.raises(BadInput, match=r"generation_config.json is damaged: eos_token_id is .*, not the number"):
            read()


def test_generation_settings_that_are_no_json_are_named_in_training_too(model):
    (model / "generation_config.json").write_bytes(DAMAGES["deep"])
    with pytest.raises(BadInput, match=r"generation_config.json is not valid JSON \(maximum recursion depth"):
        stop_ids(model)


def test_the_longest_text_of_a_tokenizer_is_a_number(model):
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": "long"}))
    with pytest.raises(BadInput, match="is damaged: model_max_length is 'long'"):
        open_tokenizer(model)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000 is above 2,000"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0 is below 1"),
        ({"hidden_size": 10**12}, "hidden_size 1000000000000 is above 100,000,000"),
        ({"vocab_size": -1}, "vocab_size -1 is below 1"),
        ({"num_attention_heads": 0}, "num_attention_heads 0 is below 1"),
        ({"text_config": {"num_local_experts": 10**7}}, r"text_config\.num_local_experts 10000000 is above 10,000"),
        ({"max_position_embeddings": 10**15}, "max_position_embeddings 1000000000000000 is above 10,000,000,000"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps nan is not a number"),
        ({"intermediate_size": float("inf")}, "intermediate_size inf is above"),
        ({"num_labels": 10**9}, "num_labels 1000000000 is above"),
        ({"rope_scaling": json.loads("[" * 200 + "]" * 200)}, "rope_scaling is nested deeper than 50"),
        ({"quantization_config": []}, "quantization_config is no object"),
        ({"architectures": 3}, "architectures 3 is no list of names"),
        ({"text_config": {}}, "its text_config is no config of a model"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder is True, and a llama has no encoder"),
        ({"hidden_size": 0, "vocab_size": 0}, "hidden_size 0 is below 1; vocab_size 0 is below 1"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_absurd_numbers_are_refused_before_anything_counts_to_them(model, change, reason):
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    begun = time.monotonic()
    with pytest.raises(BadInput, match=rf"{file} is damaged: .*{reason}"):
        read_config_json(model)
    assert time.monotonic() - begun < 5


def test_an_infinite_bound_is_no_damage(model):
    """Mamba's configs have time_step_limit: [0, Infinity]."""
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"time_step_limit": [0.0, float("inf")]}))
    assert read_config_json(model).num_hidden_layers > 0


def test_config_json_is_checked_before_transformers_reads_it_for_a_tokenizer(model):
    """It makes a table of all classes, 10^9 here."""
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_labels": 10**9}))
    with pytest.raises(BadInput, match="num_labels 1000000000 is above"):
        open_tokenizer(model)


@pytest.mark.parametrize(
    "change",
    [
        {"attn_implementation": "owner/kernel"},
        {"_attn_implementation": "paged|owner/kernel:f"},
        {"experts_implementation": {"": "owner/kernel"}},
        {"text_config": {"attn_implementation": "owner/kernel@main"}},
        {"_attn_implementation_internal": {"vision_config": "owner/kernel"}},
    ],
    ids=str,
)
def test_a_config_cannot_choose_code_of_the_hub(model, change):
    file = model / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"attn_implementation": "eager"}))
    assert read_config_json(model)._attn_implementation == "eager"
    file.write_text(json.dumps(config | change))
    with pytest.raises(BadInput, match=r"config.json chooses code of the Hub, .* '[^']*owner/kernel[^']*'; remove"):
        read_config_json(model)


@pytest.mark.parametrize("command", ["quantize MODEL --out OUT", "eval MODEL --data DATA", "generate MODEL -p x"])
def test_a_folder_with_an_adapter_beside_the_model_is_refused(model, tmp_path, capsys, command):
    """transformers would add it, and quantize leave it out."""
    (model / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "owner/other"}')
    (tmp_path / "d.jsonl").write_text('{"text": "Once upon a time."}\n')
    words = {"MODEL": str(model), "OUT": str(tmp_path / "out"), "DATA": str(tmp_path / "d.jsonl")}
    assert run([words.get(word, word) for word in command.split()]) == 2
    assert f"{model} holds a 16-bit model and an adapter of PEFT (adapter_config.json), " in capsys.readouterr().err


@pytest.mark.parametrize("reach", ["''.__class__.__mro__", "cycler.__init__.__globals__.os.getcwd()"])
def test_templates_are_rendered_in_a_sandbox(reach):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    examples = recognise(Rows(rows, Places("t.jsonl", "line", [1])), {})
    with pytest.raises(BadInput, match=r"line 1.*unsafe"):
        tokenize(examples, demo_tokenizer(f"{{{{ {reach} }}}}", MARKS), max_length=64)
