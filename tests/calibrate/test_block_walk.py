"""Walks over the blocks: moments against hooks and autograd on transformers' whole model; killed runs; many blocks."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch

from qsvd.calibrate.block_walk import GradientWalk, InputWalk
from qsvd.calibrate.moments import BlockMoments
from qsvd.cli import run
from qsvd.commands.demo import FINE_TUNING, MODEL
from qsvd.errors import BadInput
from tests.calibrate.cases import case, examples_of
from tests.checkpoints import write_checkpoint
from tests.commands.folders import files_of, python_path
from tests.runs import classifier_base

FAMILIES = ("LlamaForCausalLM", "GPTNeoXForCausalLM", "BloomForCausalLM", "LlamaForSequenceClassification")
NEAR = 1e-4  # of the largest entry: two float32 passes of the same model


def silent(words):
    del words


def outer(rows):
    rows = rows.detach().double().reshape(-1, rows.shape[-1])
    return rows.mT @ rows


def keep(kept, module, layer, given, output):
    del layer
    kept[module] = (given[0], output)


def by_definition(one, examples, seed):
    """Sums of x x^T and g g^T of every layer, with labels drawn as the walk draws them; float64, by module."""
    inputs, outputs = ({spec.module: 0 for spec in one.plan.weights} for _ in range(2))
    for number, example in enumerate(examples):
        kept, hooks = {}, []
        for module in inputs:
            hooks.append(one.whole.get_submodule(module).register_forward_hook(partial(keep, kept, module)))
        logits = one.whole(**example.inputs(torch.device("cpu"))).logits
        logits = logits.reshape(-1, logits.shape[-1])
        draw = torch.Generator().manual_seed(seed + number)
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw)[:, 0]
        loss = -logits.log_softmax(-1).gather(1, labels[:, None]).sum()
        gradients = torch.autograd.grad(loss, [out for _, out in kept.values()])
        for (module, (given, _)), gradient in zip(kept.items(), gradients, strict=True):
            inputs[module], outputs[module] = inputs[module] + outer(given), outputs[module] + outer(gradient)
        for hook in hooks:
            hook.remove()
    return inputs, outputs


def near(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=NEAR * float(expected.abs().max()))


@pytest.mark.parametrize("most_bytes", [1 << 30, 0], ids=["all inputs kept", "some inputs kept"])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_moments_of_inputs_and_gradients_are_those_of_autograd_on_the_whole_model(architecture, most_bytes):
    one, examples = case(architecture), examples_of(architecture)
    walk = GradientWalk(one.streamed(), examples, silent, seed=5, most_bytes=most_bytes)
    inputs, outputs = by_definition(one, examples, 5)
    for spec in sorted(one.plan.weights, key=walk.place):
        found = walk.objective(spec)
        near(found.inputs_II, inputs[spec.module])
        near(found.outputs_OO, outputs[spec.module])


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "BloomForCausalLM", "BertForSequenceClassification"])
def test_inputs_are_those_behind_the_split_blocks(architecture):
    one, examples = case(architecture), examples_of(architecture)
    walk = InputWalk(one.streamed(), examples, silent)
    draw = torch.Generator().manual_seed(0)
    originals = {name: tensor.clone() for name, tensor in one.whole.state_dict().items()}
    for place in range(len(walk.order)):
        specs = [spec for spec in one.plan.weights if walk.place(spec) == place]
        inputs, _ = by_definition(one, examples, 0)  # of the model whose earlier blocks are changed
        for spec in specs:
            near(walk.objective(spec).inputs_II, inputs[spec.module])
        for spec in specs:
            weight = one.whole.get_parameter(f"{spec.module}.weight").data
            changed = weight + 0.1 * torch.randn(weight.shape, generator=draw) * weight.std()
            weight.copy_(changed)
            walk.take(spec, partial(torch.clone, changed))
    one.whole.load_state_dict(originals)


def test_layers_that_share_an_input_share_its_moment():
    one = case("LlamaForCausalLM")
    walk = GradientWalk(one.streamed(), examples_of("LlamaForCausalLM"), silent, seed=0, most_bytes=1 << 30)
    found = {s.role: walk.objective(s) for s in one.plan.weights if walk.place(s) == 0}
    for alike in ("qkv", ("gate", "up")):
        assert len({found[role].inputs_II.data_ptr() for role in alike}) == 1
    assert len({one.inputs_II.data_ptr() for one in found.values()}) == 4  # q k v, o, gate up, down


def test_experts_get_a_tenth_of_the_mean_over_their_stack():
    one, examples = case("MixtralForCausalLM"), examples_of("MixtralForCausalLM")
    model = one.streamed()
    specs = [spec for spec in one.plan.weights if spec.stack and ".layers.0." in spec.module]
    sums = BlockMoments(model.block("model.layers.0"), "model.layers.0", specs, has_gradients=False)
    hidden, calls = model.record(examples[0].inputs(torch.device("cpu")))
    with sums.watching(), torch.no_grad():
        model.run_block(calls[0], model.read_block("model.layers.0"), hidden)
    before = {spec.module: sums.objective(spec) for spec in specs}
    known = {module: found.inputs_II.clone() for module, found in before.items() if not found.is_plain}
    sums.pool()
    stacks = {spec.stack for spec in specs}
    for stack in stacks:
        modules = [spec.module for spec in specs if spec.stack == stack]
        mean = sum(known[module] for module in modules if module in known) / len(modules)
        for spec in specs:
            if spec.module in modules and spec.module in known:
                torch.testing.assert_close(sums.objective(spec).inputs_II, known[spec.module] + 0.1 * mean)


def test_a_model_that_runs_its_blocks_again_is_refused():
    one = case("AlbertForSequenceClassification")
    with pytest.raises(BadInput, match="more than once"):
        InputWalk(one.streamed(), examples_of("AlbertForSequenceClassification"), silent)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model of three blocks with the tokenizer of the embedded one."""
    folder = tmp_path_factory.mktemp("source")
    write_checkpoint(folder, "LlamaForCausalLM", vocab_size=4096, num_hidden_layers=3)
    for path in MODEL.glob("tokenizer*.json"):
        shutil.copyfile(path, folder / path.name)
    return folder


def command(source, out, *more):
    texts = ("--calibrate", str(FINE_TUNING), "--max-length", "64", "--examples", "4", "--shard-size", "100KB")
    return ["quantize", str(source), "--out", str(out), "--rank", "4", "--iterations", "1", *texts, *more]


DIES = """
import os, sys
from qsvd.cli import run
from qsvd.files.quantize_folder import OutputFolder

saved, real = [], OutputFolder.save

def save(*arguments):
    real(*arguments)
    saved.append(1)
    if len(saved) == int(sys.argv[1]):
        os._exit(9)

OutputFolder.save = save
os._exit(run(sys.argv[2:]))
"""


def die_after(words, count):
    """Run the command in a process of its own that is gone when so many weights are saved; return its exit code."""
    environment = os.environ | {"PYTHONPATH": python_path()}
    return subprocess.run([sys.executable, "-c", DIES, str(count), *words], env=environment, check=False).returncode


@pytest.mark.parametrize(("sensitivity", "codec"), [("inputs", "nf4"), ("inputs", "int4-32"), ("both", "nf4")])
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, source, sensitivity, codec):
    whole, stopped, how = tmp_path / "whole", tmp_path / "stopped", ("--sensitivity", sensitivity, "--codec", codec)
    assert run(command(source, whole, *how)) == 0
    for count in (3, 8):  # inside of the first block of the walk, and in the second one
        assert die_after(command(source, stopped, *how), count) == 9
    assert run(command(source, stopped, *how)) == 0
    expected, found = files_of(whole), files_of(stopped)
    assert expected.keys() == found.keys()
    same = [name for name in expected if name.endswith((".safetensors", ".jsonl", "config.json"))]
    assert len(same) > 5  # several shards
    assert [name for name in same if expected[name] != found[name]] == []
    lines = [json.loads(line)["weighted"] for line in (whole / "errors.jsonl").read_text().splitlines()]
    assert len(lines) == 21
    assert all(line["after"] < 0.8 * line["before"] for line in lines)
    assert "weighted by inputs" in (whole / "report.md").read_text()


def test_a_budget_is_spent_on_errors_weighted_by_the_texts(tmp_path, source):
    out = tmp_path / "out"
    more = ("--include", "*.1.self_attn.[qk]_proj", "--budget", "3.5bits")
    texts = ("--calibrate", str(FINE_TUNING), "--max-length", "64", "--examples", "4", "--iterations", "1")
    assert run(["quantize", str(source), "--out", str(out), *texts, *more]) == 0
    table = (out / "allocation.txt").read_text()
    assert len([line for line in table.splitlines() if line.startswith("model.layers.1")]) == 2
    lines = [json.loads(line) for line in (out / "errors.jsonl").read_text().splitlines()]
    assert all(line["weighted"]["after"] < line["weighted"]["before"] for line in lines)


def test_other_texts_do_not_continue_a_run(tmp_path, source, capsys):
    out = tmp_path / "out"
    assert die_after(command(source, out), 3) == 9
    assert run(command(source, out, "--seed", "1")) == 2
    assert "seed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--quality", "best"), "--quality best needs texts"),
        (("--sensitivity", "both"), "--sensitivity needs --calibrate"),
        (("--calibrate", str(FINE_TUNING), "--quality", "fast"), "--quality fast uses no texts"),
        (("--calibrate", str(FINE_TUNING), "--objective", "fisher", "--statistics", "s"), "both weight errors"),
        (("--calibrate", "absent.txt"), "absent.txt"),
        (("--calibrate", str(FINE_TUNING), "--examples", "100000"), "--examples"),
    ],
)
def test_options_that_do_not_go_together_are_named_before_the_work(tmp_path, source, capsys, more, sentence):
    assert run(["quantize", str(source), "--out", str(tmp_path / "out"), "--rank", "4", *more]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_an_encoder_has_inputs_and_no_loss(tmp_path, capsys):
    source = classifier_base(tmp_path / "encoder").parent / "source"
    words = command(source, tmp_path / "out", "--max-length", "32")
    assert run([*words, "--sensitivity", "both"]) == 2
    assert "give --sensitivity inputs" in capsys.readouterr().err
    assert run([*words, "--sensitivity", "inputs"]) == 0
