"""Walks over the blocks: moments against hooks and autograd on transformers' whole model; killed runs; many blocks."""

import json
import weakref
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

import qsvd
from qsvd.calibrate import moments
from qsvd.calibrate.block_walk import GradientWalk, InputWalk
from qsvd.calibrate.moments import BlockMoments
from qsvd.calibrate.streamed import StreamedModel
from qsvd.cli import run
from qsvd.commands.demo import FINE_TUNING
from qsvd.commands.quantize import quantize_run
from qsvd.decompose.objective import PLAIN
from qsvd.errors import BadInput, DoesNotFit
from qsvd.files.quantize_folder import BackgroundWriter, OutputFolder
from qsvd.files.quantized.stack import TensorStack
from qsvd.prepare.quantize import prepare_quantize
from tests.calibrate.cases import case, examples_of, stack_of
from tests.checkpoints import write_checkpoint, write_tokenizer
from tests.commands.folders import files_of
from tests.stops import StopAfter, Stopped, killed

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


@pytest.mark.parametrize("architecture", FAMILIES)
def test_moments_of_inputs_and_gradients_are_those_of_autograd_on_the_whole_model(architecture):
    one, examples = case(architecture), examples_of(architecture)
    walk = GradientWalk(one.streamed(), examples, silent, seed=5, inputs=stack_of())
    inputs, outputs = by_definition(one, examples, 5)
    for spec in sorted(one.plan.weights, key=walk.place):
        found = walk.objective(spec)
        near(found.inputs_II, inputs[spec.module])
        near(found.outputs_OO, outputs[spec.module])
        assert not found.inputs_II.requires_grad, "the graph of the block would be kept"


def test_moments_of_a_16_bit_model_are_summed_in_float32():
    one, examples = case("LlamaForCausalLM"), examples_of("LlamaForCausalLM")
    walks = (InputWalk(one.streamed(dtype), examples, silent) for dtype in (torch.float32, torch.bfloat16))
    exact, found = (walk.objective(one.plan.weights[0]).inputs_II for walk in walks)
    assert found.dtype == torch.float32
    assert (found - exact).norm() < 0.01 * exact.norm()


def test_with_little_memory_some_inputs_of_blocks_are_kept_and_the_others_computed_again():
    one, examples, found = case("LlamaForCausalLM", num_hidden_layers=5), examples_of("LlamaForCausalLM"), []
    for most_bytes, kept, runs in ((1 << 30, 5, 5), (0, 2, 5 + 1 + 2)):  # the first and the fourth of five
        shown = []
        walk = GradientWalk(one.streamed(), examples, shown.append, seed=0, inputs=stack_of(most_bytes))
        assert len(walk._inputs) == kept
        found.append([walk.objective(spec) for spec in one.plan.weights[::-1] if spec.role == "q"])
        assert sum("runs forward" in words for words in shown) == runs
        assert len(walk._inputs) == 0
    for all_kept, some_kept in zip(*found, strict=True):
        assert torch.equal(all_kept.inputs_II, some_kept.inputs_II)
        assert torch.equal(all_kept.outputs_OO, some_kept.outputs_OO)


@pytest.mark.parametrize("most_bytes", [1 << 30, 0])
def test_inputs_of_blocks_are_in_memory_only_while_their_block_runs(monkeypatch, most_bytes):
    one, examples = case("LlamaForCausalLM", num_hidden_layers=5), examples_of("LlamaForCausalLM")
    kept, push = [], TensorStack.push
    monkeypatch.setattr(TensorStack, "push", lambda own, some: kept.extend(map(weakref.ref, some)) or push(own, some))
    walk = GradientWalk(one.streamed(), examples, silent, seed=0, inputs=stack_of(most_bytes))
    for spec in one.plan.weights[::-1]:
        walk.objective(spec)
        assert not any(state() is not None for state in kept)
    assert len(kept) == len(examples) * (5 if most_bytes else 2 + 1 + 2)


def test_a_stack_gives_back_what_it_was_given_and_its_file_has_no_name(tmp_path):
    lists = [[torch.randn(1, 7, 3), torch.ones(2, dtype=torch.bfloat16)], [torch.randn(5, 4).mT], [torch.empty(0, 3)]]
    kept = TensorStack(tmp_path, 0)
    for some in lists:
        kept.push(some)
    assert [*tmp_path.iterdir()] == []
    last = kept.pop()
    kept.push(lists[0])
    for some in (lists[0], lists[1], lists[0]):
        for found, expected in zip(kept.pop(), some, strict=True):
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)
    assert (len(kept), last[0].shape) == (0, (0, 3))


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "BloomForCausalLM", "BertForSequenceClassification", "GPT2LMHeadModel"]
)
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
            weight = weight.mT if architecture == "GPT2LMHeadModel" else weight  # its layers keep [I, O]
            changed = weight + 0.1 * torch.randn(weight.shape, generator=draw) * weight.std()
            weight.copy_(changed)
            walk.take(spec, partial(torch.clone, changed))
    one.whole.load_state_dict(originals)


def test_layers_that_share_an_input_share_its_moment_which_is_summed_once(monkeypatch):
    one, examples, sums, add = case("LlamaForCausalLM"), examples_of("LlamaForCausalLM"), [], moments._add
    monkeypatch.setattr(moments, "_add", lambda *given: sums.append(given) or add(*given))
    walk = GradientWalk(one.streamed(), examples, silent, seed=0, inputs=stack_of())
    found = [walk.objective(spec) for spec in one.plan.weights if walk.place(spec) == 0]
    assert len({one.inputs_II.data_ptr() for one in found}) == 4  # q k v, o, gate up, down
    assert len(sums) == len(examples) * (4 + len(found))  # inputs, and gradients at outputs


def test_experts_get_a_tenth_of_the_mean_over_their_stack_and_are_plain_without_tokens():
    one, (example,) = case("MixtralForCausalLM"), examples_of("MixtralForCausalLM", lengths=[1])  # two of four get it
    model, path = one.streamed(), "model.layers.0"
    specs = [spec for spec in one.plan.weights if spec.stack and spec.module.startswith(path)]
    sums = BlockMoments(model.block(path), path, specs)
    hidden, calls = model.record(example.inputs(torch.device("cpu")))
    with sums.watching():
        output = model.run_block(calls[0], model.read_block(path), hidden.requires_grad_())
        torch.autograd.grad(output.square().sum(), hidden)
    before = deepcopy({spec.module: sums.objective(spec) for spec in specs})
    sums.pool()
    for stack in {spec.stack for spec in specs}:
        members = [spec for spec in specs if spec.stack == stack]
        known = [spec for spec in members if not before[spec.module].is_plain]
        assert (len(members), len(known)) == (4, 2)
        assert sum(sums.objective(spec) is PLAIN for spec in members) == 2
        for side in ("inputs_II", "outputs_OO"):
            mean = sum(getattr(before[spec.module], side) for spec in known) / 4
            for spec in known:
                expected = getattr(before[spec.module], side) + 0.1 * mean
                torch.testing.assert_close(getattr(sums.objective(spec), side), expected)
    walk = InputWalk(one.streamed(), [example], silent)
    for spec in specs:
        if not before[spec.module].is_plain:
            torch.testing.assert_close(walk.objective(spec).inputs_II, sums.objective(spec).inputs_II)


class Pair(torch.nn.Module):
    """Two layers that get the same tensor, or not."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, hidden, apart):
        return self.a(hidden) + self.b(hidden.clone() if apart else hidden)


@pytest.mark.parametrize("first_apart", [False, True])
def test_layers_that_share_an_input_in_some_texts_only_are_refused(first_apart):
    block = Pair()
    sums = BlockMoments(block, "one", [SimpleNamespace(module=f"one.{name}") for name in "ab"])
    now, others = ("one.a", "one.b") if first_apart else ("no layer", "one.a")
    with sums.watching():
        block(torch.ones(1, 2, 4), first_apart)
    sentence = f"one.b shares its input with {now} in some texts and with {others} in others; --exclude it"
    with pytest.raises(BadInput, match=sentence), sums.watching():
        block(torch.ones(1, 2, 4), not first_apart)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (lambda logits, others: (logits * torch.inf, others), "an example has logits that are NaN or infinite"),
        (
            lambda logits, others: (logits + others[0].sum(), others),
            "outputs of other blocks than the last; give",
        ),
    ],
)
def test_an_output_without_gradients_at_the_last_block_alone_is_refused(monkeypatch, changed, sentence):
    one, logits = case("LlamaForCausalLM"), StreamedModel.logits
    monkeypatch.setattr(StreamedModel, "logits", lambda *given: changed(*logits(*given)))
    with pytest.raises(BadInput, match=sentence):
        GradientWalk(one.streamed(), examples_of("LlamaForCausalLM"), silent, seed=0, inputs=stack_of())


def test_a_model_that_runs_its_blocks_again_is_refused():
    one = case("AlbertForSequenceClassification")
    with pytest.raises(BadInput, match="more than once"):
        InputWalk(one.streamed(), examples_of("AlbertForSequenceClassification"), silent)


def write_model(folder, architecture="LlamaForCausalLM", **options):
    """A random model with the tokenizer of the embedded one."""
    write_checkpoint(folder, architecture, vocab_size=4096, **options)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("source"), num_hidden_layers=3)


def options(source, out, **changes):
    texts = {"calibrate": str(FINE_TUNING), "max_length": 32, "examples": 4}
    return qsvd.Quantize(str(source), out=out, **({"rank": 4, "iterations": 1} | texts | changes))


def quantize_to_small_files(options):
    """A few weights in each: smaller ones than the option allows. Returns what was shown."""
    show = StopAfter()
    quantize_run(replace(prepare_quantize(options), shard_bytes=30_000), show)
    return show.seen


def recorded(monkeypatch, *methods):
    """The names of methods in the order of their calls."""
    calls = []

    def record(owner, name):
        method = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given: calls.append(name) or method(*given))

    for owner, name in methods:
        record(owner, name)
    return calls


@pytest.mark.parametrize(
    ("sensitivity", "codec", "kills"),  # number 2 is inside of the first block of the walk, and 5 in the second one
    [("inputs", "nf4", (5,)), ("both", "int4-32", (2,))],
)
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, source, monkeypatch, sensitivity, codec, kills):
    how = {"sensitivity": sensitivity, "codec": codec, "include": ("*.q_proj", "*.k_proj", "*.down_proj")}
    whole, stopped = (options(source, tmp_path / name, **how) for name in "ab")
    quantize_to_small_files(whole)
    for number in kills:
        killed(monkeypatch, OutputFolder, "save", number, partial(quantize_to_small_files, stopped))
    calls = recorded(
        monkeypatch, (BackgroundWriter, "write_shard"), (BackgroundWriter, "wait"), (OutputFolder, "entries")
    )
    shown = quantize_to_small_files(stopped)
    assert any("block 2/3 of the calibration" in now.what for now in shown)
    assert 0 < shown[-1].new < shown[-1].done
    assert ("write_shard", "entries") not in pairwise(calls), "files are complete before they are read"
    assert ("entries" in calls) == (sensitivity == "inputs")
    expected, found = files_of(whole.out), files_of(stopped.out)
    assert expected.keys() == found.keys()
    same = [name for name in expected if name.endswith((".safetensors", ".jsonl", "config.json"))]
    assert len(same) > 5  # several shards
    assert [name for name in same if expected[name] != found[name]] == []
    lines = [json.loads(line)["weighted"] for line in (whole.out / "errors.jsonl").read_text().splitlines()]
    assert len(lines) == 9
    assert all(line["after"] < 0.8 * line["before"] for line in lines)
    moments = "inputs" if sensitivity == "inputs" else "inputs and gradients"
    words = f"weighted by {moments} of 4 texts, rounded with error feedback"
    assert words in (whole.out / "report.md").read_text()


def test_a_budget_is_spent_on_errors_weighted_by_the_texts_and_the_head_is_plain(tmp_path, source):
    out, more = tmp_path / "out", {"include": ("*.[12].self_attn.k_proj",), "budget": "3.5bits", "head_bits": 8}
    shown = quantize_to_small_files(options(source, out, sensitivity="inputs", **more))
    assert "measuring, block 2/3 of the calibration" in [now.what for now in shown]
    table = (out / "allocation.txt").read_text().splitlines()
    expected = [float(line.split()[-1]) for line in table if line.startswith("model.layers.")]
    *lines, head = [json.loads(line) for line in (out / "errors.jsonl").read_text().splitlines()]
    assert all(line["weighted"]["after"] < line["weighted"]["before"] for line in lines)
    assert [line["weighted"]["after"] for line in lines] == pytest.approx(expected, rel=0.05)
    assert head["name"] == "lm_head"
    assert "weighted" not in head


def test_other_texts_do_not_continue_a_run(tmp_path, source):
    wanted, others = options(source, tmp_path / "out", include=("*.0.mlp.*",)), tmp_path / "others.txt"
    with pytest.raises(Stopped):
        quantize_run(prepare_quantize(wanted), StopAfter(7))
    others.write_text(FINE_TUNING.read_text(encoding="utf-8").upper())
    with pytest.raises(BadInput, match="was written with other options: the examples as tokens changed;"):
        qsvd.quantize(replace(wanted, calibrate=str(others)))


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--quality", "best"), "--quality best needs texts"),
        (("--sensitivity", "both"), "--sensitivity needs --calibrate"),
        (("--examples", "3", "--max-length", "9"), "--examples needs --calibrate DATA; --max-length needs --calibrate"),
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


def test_an_encoder_has_inputs_and_no_loss(tmp_path):
    source = write_model(tmp_path / "encoder", "BertModel", num_hidden_layers=1, pad_token_id=2)
    with pytest.raises(BadInput, match="which has no loss to take gradients of: give --sensitivity inputs"):
        qsvd.quantize(options(source, tmp_path / "out"))
    qsvd.quantize(options(source, tmp_path / "out", sensitivity="inputs"))


def test_an_encoder_decoder_is_refused(tmp_path):
    write_checkpoint(tmp_path / "t5", "T5ForConditionalGeneration")
    with pytest.raises(BadInput, match="is an encoder-decoder model, which --calibrate does not measure"):
        qsvd.quantize(options(tmp_path / "t5", tmp_path / "out"))


def test_texts_whose_hidden_states_do_not_fit_are_refused(tmp_path, source, monkeypatch):
    monkeypatch.setattr("qsvd.prepare.quantizing.calibration.free_host_memory", lambda: 50_000)
    sentence = r"the hidden states of 4 texts of \d+ tokens need 0.0 GB, and 0.0 GB are half of the free CPU memory"
    with pytest.raises(DoesNotFit, match=sentence):
        qsvd.quantize(options(source, tmp_path / "out"))
