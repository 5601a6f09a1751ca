"""tools/make_model: a random model in 16 bits, split by nobody, or split by qsvd quantize as it is drawn."""

import json
import runpy
import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from math import prod
from pathlib import Path

import pytest
import random_model
import random_weights
import torch
import transformers
import tyro

import qsvd
from qsvd.cli import run
from qsvd.commands.demo import MODEL
from qsvd.commands.quantize import quantize_run
from qsvd.files.layout import digest, fingerprint
from qsvd.files.source import open_checkpoint
from qsvd.files.split_folder import open_split
from qsvd.files.workspace import MANIFEST
from qsvd.prepare.quantize import prepare_quantize
from qsvd.records import show_nothing
from tests.checkpoints import tiny_config
from tests.commands.folders import files_of, tensors_of
from tests.stops import StopAfter, Stopped

TOOL = Path(random_model.__file__).with_name("make_model")
SHAPE = {"layers": 2, "hidden": 64, "ffn": 128, "heads": 4, "kv_heads": 2, "vocab": 4096}  # the tokenizer's vocabulary
FLAGS = [f"--{name.replace('_', '-')}={size}" for name, size in SHAPE.items()]
PARAMETERS = {"llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496}  # of the models' cards


def drawn_model(config=None, *, seed=0, layers_per_shard=1, files=None):
    config = config or random_model.llama_config(SHAPE)
    return random_model.random_model(
        "tiny", config, seed, torch.device("cpu"), layers_per_shard=layers_per_shard, files=files
    )


def options(out, **changes):
    return qsvd.Quantize("tiny", out=out, **({"rank": 8, "device": "cpu", "shard_size": "100KB"} | changes))


def make(tool, *arguments):
    """The command in this process."""
    tool.main(tyro.cli(tool.Options, args=[str(argument) for argument in arguments]))


@pytest.fixture(scope="module")
def split_base(tmp_path_factory):
    """A drawn split base in several shards, with a tokenizer."""
    out = tmp_path_factory.mktemp("split") / "out"
    random_model.write_split(drawn_model(files=MODEL), options(out))
    return out


@pytest.mark.parametrize("preset", PARAMETERS)
def test_a_preset_has_the_true_number_of_parameters(preset):
    model = drawn_model(random_model.llama_config(random_model.SHAPES[preset]), layers_per_shard=4)
    assert sum(prod(entry.shape) for entry in model.source.tensors.values()) == PARAMETERS[preset]
    assert model.source.config_json["rope_parameters"]["rope_theta"] == 500000
    assert len(model.shards) == 2 + random_model.SHAPES[preset]["layers"] / 4


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "GPTNeoXForCausalLM", "BertModel"])
def test_a_checkpoint_of_any_family_is_the_one_that_transformers_expects(tmp_path, architecture):
    random_model.write_16_bit(drawn_model(tiny_config(architecture)), tmp_path / "out")
    loaded, info = getattr(transformers, architecture).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 4  # before the blocks, two of them, after them
    for name, tensor in loaded.state_dict().items():
        if name.endswith("bias"):
            assert torch.all(tensor == 0), name
        elif tensor.ndim == 1:
            assert torch.all(tensor == 1), name
        else:
            assert 0.01 < tensor.float().std() < 0.3, name


def test_a_tied_head_is_written_once(tmp_path):
    random_model.write_16_bit(drawn_model(tiny_config("LlamaForCausalLM", tie_word_embeddings=True)), tmp_path / "out")
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    _, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())


def test_neither_order_nor_shards_change_a_tensor(tmp_path):
    for layers in (1, 2):
        random_model.write_16_bit(drawn_model(layers_per_shard=layers), tmp_path / str(layers))
    one, two = tensors_of(tmp_path / "1"), tensors_of(tmp_path / "2")
    assert all(torch.equal(one.pop(name), tensor) for name, tensor in two.items())
    assert one == {}
    source = drawn_model().source
    last, *_, first = source.tensors
    assert torch.equal(source.read(first), two[first])
    assert torch.equal(source.read(last), two[last])


def test_another_seed_draws_another_model():
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(drawn_model(seed=1).source.read(name), drawn_model().source.read(name))
    assert drawn_model(seed=1).source.fingerprint != drawn_model().source.fingerprint


@pytest.mark.parametrize("shard_size", ["100KB", "5GB"])
def test_splitting_what_is_drawn_gives_the_bytes_of_splitting_what_was_written(tmp_path, shard_size):
    model = drawn_model(files=MODEL)
    random_model.write_16_bit(model, tmp_path / "source")
    written = open_checkpoint(str(tmp_path / "source"))
    assert list(written.tensors) == list(model.source.tensors)
    for folder, source in (("written", written), ("drawn", model.source)):
        run = prepare_quantize(options(tmp_path / folder, shard_size=shard_size, iterations=2), source)
        show = StopAfter()
        quantize_run(run, show)
        assert len(show.seen) == 14
    written, drawn = (files_of(tmp_path / folder) for folder in ("written", "drawn"))
    assert written.keys() == drawn.keys() >= {"tokenizer.json", "config.json", "adapter_model.safetensors"}
    assert (sum(name.startswith("model-") for name in drawn) > 1) == (shard_size == "100KB")
    different = {name for name in drawn if drawn[name] != written[name]}
    assert different == {MANIFEST, "README.md"}  # source's fingerprint, and OUT's path


def test_a_stopped_split_of_what_is_drawn_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("qsvd.files.check.MOST_NUMBERS", 100)  # parts of what is drawn cannot be read
    quantize_run(prepare_quantize(options(tmp_path / "whole", iterations=1), drawn_model().source), show_nothing)
    stopped = prepare_quantize(options(tmp_path / "stopped", iterations=1), drawn_model().source)
    with pytest.raises(Stopped):
        quantize_run(stopped, StopAfter(9))
    rest = StopAfter()
    quantize_run(prepare_quantize(stopped.options, drawn_model().source), rest)
    assert [now.new > 0 for now in rest.seen] == [False] * 9 + [True] * 5
    assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "whole")


def test_another_seed_does_not_go_on_with_a_split(tmp_path):
    with pytest.raises(Stopped):
        quantize_run(prepare_quantize(options(tmp_path / "out"), drawn_model().source), StopAfter(1))
    with pytest.raises(ValueError, match="was written with other options: the 16-bit model changed"):
        quantize_run(prepare_quantize(options(tmp_path / "out"), drawn_model(seed=1).source), show_nothing)


def weights_of(folder):
    return {name: content for name, content in files_of(folder).items() if name.endswith(".safetensors")}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # transformers on PEFT's question
def test_a_drawn_split_base_is_what_plain_transformers_and_qsvd_load(split_base):
    split = open_split(split_base)
    assert len(split.weights) == 14
    assert len(list(split_base.glob("model-*.safetensors"))) > 1
    ids = torch.arange(32).view(1, -1)
    theirs = transformers.LlamaForCausalLM.from_pretrained(split_base).train()
    ours = qsvd.load(str(split_base))
    with torch.no_grad():
        expected = ours(input_ids=ids).logits
        found = theirs(input_ids=ids).logits.float()
    assert torch.norm(found - expected) < 0.03 * torch.norm(expected)  # theirs computes in bfloat16
    for name, weight in split.weights.items():
        up, down = split.factors(name)
        assert (list(up.shape), list(down.shape)) == ([weight["shape"][0], 8], [8, weight["shape"][1]])
        assert split.residual(name).decode().std() == pytest.approx(random_weights.STD, rel=0.1)


def test_a_drawn_split_base_has_no_report_and_says_why(split_base, capsys):
    assert run(["report", str(split_base)]) == 2
    assert capsys.readouterr().err == (
        f"qsvd: {split_base} was drawn at random: no weight was split, so there is no error to report\n"
    )
    assert (split_base / "errors.jsonl").read_text() == ""
    assert "all drawn at random" in (split_base / "README.md").read_text()
    assert "no error was measured" in (split_base / "report.md").read_text()


def test_a_drawn_split_base_is_trained(split_base, tmp_path):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": f"word {n}"}) + "\n" for n in range(8)))
    flags = ["--steps", "1", "--batch-size", "2", "--accumulate", "1", "--max-length", "16", "--device", "cpu"]
    assert run(["train", str(split_base), str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "run"), *flags]) == 0


@pytest.mark.parametrize("stop_at", [0, 5, 13])
def test_a_stopped_split_base_goes_on_to_the_same_bytes(split_base, tmp_path, monkeypatch, stop_at):
    calls, draw = [], random_model.draw_codes

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) > stop_at:
            raise KeyboardInterrupt
        return draw(*arguments)

    model, wanted = drawn_model(files=MODEL), options(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(random_model, "draw_codes", stopping)
        with pytest.raises(KeyboardInterrupt):
            random_model.write_split(model, wanted)
    random_model.write_split(model, wanted)
    random_model.write_split(model, wanted)  # a complete one is left as it is
    assert weights_of(tmp_path / "out") == weights_of(split_base)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("rank", [0, 3])
def test_a_drawn_split_has_the_tensors_of_a_real_one(tmp_path, rank, double_quant):
    flags = {"rank": rank, "double_quant": double_quant, "iterations": 1}
    random_model.write_split(drawn_model(), options(tmp_path / "drawn", **flags))
    quantize_run(prepare_quantize(options(tmp_path / "real", **flags), drawn_model().source), show_nothing)
    drawn, real = (tensors_of(tmp_path / folder) for folder in ("drawn", "real"))
    assert drawn.keys() == real.keys()
    for name, tensor in real.items():
        assert drawn[name].dtype == tensor.dtype
        if "quant_state" not in name:  # whose length is that of a number's digits
            assert drawn[name].shape == tensor.shape
    assert (tmp_path / "drawn" / "adapter_model.safetensors").exists() == (rank > 0)
    assert files_of(tmp_path / "drawn").keys() == files_of(tmp_path / "real").keys()


def test_the_digests_of_a_drawn_split_are_those_of_its_tensors(split_base):
    split, tensors = open_split(split_base), tensors_of(split_base)
    digests = {
        name: digest({key: tensor for key, tensor in tensors.items() if key == name or key.startswith(f"{name}.")})
        for name in split.weights
    }
    assert {name: weight["residual_sha256"] for name, weight in split.weights.items()} == digests
    assert split.fingerprint == fingerprint(digests)


def test_the_command_splits_a_config_on_the_fly_and_prints_time_and_peaks(tool, tmp_path, capsys):
    flags = config_file(tmp_path, tiny_config("Qwen2ForCausalLM").to_json_string())
    make(tool, tmp_path / "out", *flags, "--as", "quantized", "--rank=4", "--device=cpu")
    shown = capsys.readouterr().out
    assert "Quantization error of qwen2, random, seed 0" in shown
    last = shown.splitlines()[-1]
    assert last.startswith(f"{tmp_path / 'out'}: ")
    assert " s, CPU memory peak " in last
    assert len(open_split(tmp_path / "out").weights) == 14


def test_the_command_writes_a_llama_of_the_flags_in_16_bits(tool, tmp_path):
    flags = [*FLAGS[1:], "--layers=3", "--layers-per-shard=2", "--dtype=float32", "--seed=3"]
    make(tool, tmp_path / "out", *flags)
    tensors = tensors_of(tmp_path / "out")
    source = drawn_model(random_model.llama_config(SHAPE | {"layers": 3}), seed=3).source
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {n: e.shape for n, e in source.tensors.items()}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("config.json", "model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors"),
        *("model-00003-of-00004.safetensors", "model-00004-of-00004.safetensors", "model.safetensors.index.json"),
    ]


def config_file(folder: Path, content: str) -> list[str]:
    (folder / "config.json").write_text(content)
    return ["--config", str(folder / "config.json")]


REFUSALS: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "unknown config": (lambda f: config_file(f, '{"model_type": "xyz"}'), "transformers cannot read .*xyz"),
    "no config": (lambda f: ["--config", str(f / "config.json")], "config.json does not exist"),
    "config and shape": (
        lambda f: [*config_file(f, tiny_config("LlamaForCausalLM").to_json_string()), "--kv-heads=2", "--layers=1"],
        "--config sets the whole shape; leave out --layers, --kv-heads",
    ),
    "OUT exists": (lambda f: (f / "out").mkdir() or FLAGS, "out exists; give a new folder"),
    "negative sizes": (lambda _: ["--layers=-1", "--vocab=0"], "--layers -1, --vocab 0: give 1 or more"),
    "odd heads": (lambda _: [*FLAGS, "--heads=5"], "transformers makes no Llama of .*'heads': 5"),
    "layers per shard": (lambda _: [*FLAGS, "--layers-per-shard=0"], "--layers-per-shard 0 is below 1"),
    "tokenizer": (lambda f: [*FLAGS, f"--tokenizer={f / 'none'}"], "--tokenizer .*none is not a folder"),
    "device": (lambda _: [*FLAGS, "--device=tpu"], "--device 'tpu' is not one of auto, cpu"),
    "rank": (lambda _: [*FLAGS, "--as=split", "--rank=99"], "--rank 99 is above the shorter side"),
    "strangers": (
        lambda f: (f / "out").mkdir() or (f / "out" / "x").touch() or [*FLAGS, "--as=split", "--rank=4"],
        "is not empty and was not written by qsvd quantize",
    ),
}


@pytest.fixture(scope="module")
def tool():
    """The script as a module."""
    loader = SourceFileLoader("make_model", str(TOOL))
    spec = spec_from_loader("make_model", loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules["make_model"] = module  # where dataclasses look for its annotations
    loader.exec_module(module)
    return module


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_made_is_refused_in_a_sentence(tool, tmp_path, case):
    arguments, sentence = REFUSALS[case]
    flags = arguments(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        make(tool, tmp_path / "out", *flags)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_refusal_of_the_command_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(TOOL), str(tmp_path / "out"), "--layers=-1"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert ended.value.code == "make_model: --layers -1: give 1 or more"
    assert capsys.readouterr().out == ""
