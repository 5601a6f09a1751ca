"""One block at a time is in memory; how many examples go together changes no bit; what is no plain chain is refused."""

import weakref
from dataclasses import replace

import pytest
import torch

from qsvd.calibrate.stand_in import Call, Tape
from qsvd.calibrate.streamed import StreamedModel
from qsvd.files.source import Checkpoint
from tests.calibrate.cases import case, examples_of, means_of, sums_of


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(("architecture", "probes"), [("LlamaForCausalLM", 2), ("BertForSequenceClassification", 0)])
def test_the_sums_are_the_same_bits_however_many_examples_go_together(architecture, probes):
    one, examples = case(architecture), examples_of(architecture, lengths=(9, 14, 6, 5, 9))
    model = one.streamed(twice=probes > 0)
    whole = sums_of(model, examples, probes=probes).values
    for chunk in (1, 3):
        assert same(sums_of(model, examples, chunk=chunk, probes=probes).values, whole)


@pytest.mark.parametrize("probes", [0, 2])
def test_one_block_is_in_memory_at_a_time(probes, monkeypatch):
    """When a block is asked for, every tensor of the blocks before it is gone; and each is read twice a chunk."""
    alive, asked, read_block = [], [], StreamedModel.read_block

    def watched(self, path):
        assert [name for name, reference in alive if reference() is not None] == []
        tensors = read_block(self, path)
        asked.append(path)
        alive.extend((f"{path}.{name}", weakref.ref(tensor)) for name, tensor in tensors.items())
        return tensors

    monkeypatch.setattr(StreamedModel, "read_block", watched)
    one, examples = case("LlamaForCausalLM", num_hidden_layers=4), examples_of("LlamaForCausalLM")
    sums_of(one.streamed(twice=probes > 0), examples, chunk=2, probes=probes)
    blocks = [f"model.layers.{number}" for number in range(4)]
    up_and_down = [*blocks, *reversed(blocks)]
    assert asked == ["model.layers.0", *up_and_down, *up_and_down]  # the first to see what a block returns


def test_what_lies_around_the_blocks_is_read_once_and_no_block_with_it(monkeypatch):
    names, read = [], Checkpoint.read

    def watched(self, name):
        names.append(name)
        return read(self, name)

    monkeypatch.setattr(Checkpoint, "read", watched)
    case("LlamaForCausalLM", tie_word_embeddings=True).streamed()
    assert sorted(names) == ["model.embed_tokens.weight", "model.norm.weight"]


def test_only_weights_that_are_asked_for_get_statistics_and_all_blocks_run():
    one, examples = case("LlamaForCausalLM"), examples_of("LlamaForCausalLM")
    some = [spec for spec in one.plan.weights if spec.layer == 1 and spec.role in ("q", "down")]
    part = replace(one, plan=replace(one.plan, weights=tuple(some)))
    whole, found = means_of(one.streamed(), examples), means_of(part.streamed(), examples)
    assert sorted(found) == sorted(f"{spec.module}.{side}" for spec in some for side in ("rows", "columns"))
    assert all(torch.equal(found[name], whole[name]) for name in found)


@pytest.mark.parametrize("probes", [0, 1])
def test_a_weight_that_no_token_reaches_has_moments_and_a_trace_of_zero(probes, monkeypatch):
    """As an expert that the router leaves out: the block runs without it."""
    run_block, idle = StreamedModel.run_block, "mlp.up_proj.weight"

    def without(self, call, weights, hidden):
        return run_block(self, call, {**weights, idle: weights[idle].detach()}, hidden)

    monkeypatch.setattr(StreamedModel, "run_block", without)
    model = case("LlamaForCausalLM").streamed(twice=probes > 0)
    found = means_of(model, examples_of("LlamaForCausalLM"), probes=probes)
    for name, values in found.items():
        if not name.endswith("trace_error"):
            assert values.eq(0).all() == ("up_proj" in name)


@pytest.mark.parametrize(
    ("architecture", "sentence"),
    [
        (
            "AlbertForSequenceClassification",
            r"albert.encoder.albert_layer_groups.0 is called more than once for one text, so the blocks cannot",
        ),
        ("Gemma3nForCausalLM", r"model.layers.0 gets a KVSharingDict, which may change, so the blocks cannot"),
    ],
)
def test_models_that_are_no_plain_chain_are_refused(architecture, sentence):
    with pytest.raises(ValueError, match=f"^{sentence} be run one at a time; calibrate a model whose blocks are"):
        means_of(case(architecture).streamed(), examples_of(architecture))


def test_a_model_that_takes_more_than_tokens_is_refused():
    with pytest.raises(
        ValueError, match=r"^MusicgenForCausalLM cannot be run on a text of 9 tokens: shape '\[-1, 2, 9\]' is"
    ):
        means_of(case("MusicgenForCausalLM").streamed(), examples_of("MusicgenForCausalLM"))


def refusal_of(*calls, last=None, num_blocks=3):
    """What a tape says of the last of these calls: path, hidden states, other arguments."""
    tape = Tape(num_blocks, last, 0, keep=True)
    for path, hidden, others in calls[:-1]:
        tape.answer(path, (hidden(tape),), others)
    path, hidden, others = calls[-1]
    first = hidden(tape)
    with pytest.raises(ValueError, match="so the blocks cannot be run one at a time") as refused:
        tape.answer(path, () if first is None else (first,), others(tape) if callable(others) else others)
    return str(refused.value).partition(", so ")[0]


def test_calls_that_depend_on_more_than_the_block_before_are_refused():
    """As models make them that add, share or skip hidden states between their blocks."""
    start, before = ("a", lambda _: torch.ones(1, 2, 3), {}), lambda tape: tape.passed[-1]
    assert refusal_of(("a", lambda _: None, {})) == "a is not called with hidden states first"
    assert refusal_of(start, ("a", before, {})) == "a is called more than once for one text"
    assert refusal_of(start, ("b", lambda tape: before(tape) + 1, {})) == (
        "the model changes the output of a before b gets it"
    )
    assert refusal_of(start, ("b", before, lambda tape: {"first": 2 * tape.passed[0]})) == (
        "b uses other outputs of earlier blocks than the hidden states"
    )
    assert refusal_of(start, ("b", before, {"cache": object(), "mask": None})) == ("b gets a object, which may change")


class _Writes(torch.nn.Module):
    def forward(self, hidden, seen):
        seen["mine"] = hidden
        return hidden


def test_a_block_that_leaves_something_in_its_arguments_is_refused():
    call = Call("layers.4", ({},), {}, is_named=False)
    with pytest.raises(
        ValueError, match=r"^layers.4 passes tensors other than the hidden states to later blocks, so the blo"
    ):
        call.run(_Writes(), {}, torch.ones(1, 2, 3))


def test_an_output_that_uses_an_earlier_block_is_refused(monkeypatch):
    logits = StreamedModel.logits
    monkeypatch.setattr(StreamedModel, "logits", lambda *given: _mixed(*logits(*given)))
    with pytest.raises(
        ValueError, match=r"^the model's output uses outputs of other blocks than the last; it cannot be run block"
    ):
        means_of(case("LlamaForCausalLM").streamed(), examples_of("LlamaForCausalLM"))


def _mixed(logits, others):
    """As a model does that averages the outputs of its blocks."""
    return logits + others[0].sum(), others


def test_a_block_that_no_text_goes_through_is_refused():
    model = case("LlamaForCausalLM").streamed()
    model._empty["model.layers.7"] = model._empty["model.layers.0"]
    with pytest.raises(
        ValueError, match=r"^LlamaForCausalLM does not call model.layers.7 for a text; --exclude them, or"
    ):
        model.record({"input_ids": torch.tensor([[5, 6, 7]])})


def test_tensors_that_transformers_makes_on_loading_are_refused():
    one = case("LlamaForCausalLM")
    spelling = {model: name for model, name in one.plan.spelling.items() if model != "model.norm.weight"}
    sentence = (
        r"^1 tensors of LlamaForCausalLM are not in the checkpoint as they are in the model \(model.norm.weight\): "
        "transformers merges them or draws them at random on loading; such a model cannot be calibrated$"
    )
    with pytest.raises(ValueError, match=sentence):
        replace(one, plan=replace(one.plan, spelling=spelling)).streamed()
