"""Second moments against per-example autograd on transformers' whole model, with transformers' own loss."""

from dataclasses import replace

import pytest
import torch
import transformers

from tests.calibrate.cases import case, examples_of, means_of, own_loss

# Two runs of a two-layer float32 model differ by some roundings of its largest gradients; squares by twice that.
# Of the largest moment of a weight; seen 1e-6 where attention is another kernel, 6e-8 where it is the same.
ROUNDOFF = 64 * 2.0**-24
FAMILIES = (
    *("LlamaForCausalLM", "GPTNeoXForCausalLM", "Gemma2ForCausalLM", "OPTForCausalLM"),
    *("BloomForCausalLM", "BertForSequenceClassification", "DebertaV2ForSequenceClassification"),
    *("LlamaForSequenceClassification", "ModernBertForSequenceClassification"),
)


def squared_gradients(one, examples):
    """Mean over examples of the squared gradient, by module, float64."""
    found = {spec.module: 0.0 for spec in one.plan.weights}
    for example in examples:
        weights = [one.whole.get_parameter(f"{module}.weight") for module in found]
        gradients = torch.autograd.grad(own_loss(one.whole, example), weights)
        for module, gradient in zip(found, gradients, strict=True):
            found[module] = found[module] + gradient.double().square() / len(examples)
    return found


@pytest.mark.parametrize("architecture", FAMILIES)
def test_rows_and_columns_are_means_of_squared_gradients_of_each_example(architecture):
    """Masks that differ by layer, blocks that return tuples or are asked what they are, poolers, relative positions."""
    one, examples = case(architecture), examples_of(architecture)
    found = means_of(one.streamed(), examples)
    for module, squares_OI in squared_gradients(one, examples).items():
        for part, dim in (("rows", 1), ("columns", 0)):
            expected = squares_OI.mean(dim)
            assert found[f"{module}.{part}"].dtype == torch.float32
            assert found[f"{module}.{part}"].tolist() == pytest.approx(
                expected.tolist(), abs=ROUNDOFF * expected.max().item(), rel=1e-4
            )


@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "GptOssForCausalLM"])
def test_moments_of_experts_are_those_of_their_slices_and_at_least_a_tenth_of_the_mean(architecture):
    one, examples = case(architecture), examples_of(architecture)
    stacks = {}
    for spec in one.plan.weights:
        if spec.stack:
            stacks.setdefault(spec.stack, []).append(spec)
    squares = dict.fromkeys(stacks, 0.0)
    for example in examples:
        parameters = [one.whole.get_parameter(stack) for stack in stacks]
        for stack, gradient in zip(stacks, torch.autograd.grad(own_loss(one.whole, example), parameters), strict=True):
            squares[stack] = squares[stack] + gradient.double().square() / len(examples)
    found = means_of(one.streamed(), examples)
    for stack, specs in stacks.items():
        squares_EOI = squares[stack] if squares[stack].shape[1:] == specs[0].shape else squares[stack].mT
        for part, dim in (("rows", 2), ("columns", 1)):
            means_E = squares_EOI.mean(dim)
            for spec, expected in zip(specs, torch.maximum(means_E, 0.1 * means_E.mean(0)), strict=True):
                assert found[f"{spec.module}.{part}"].tolist() == pytest.approx(
                    expected.tolist(), abs=ROUNDOFF * expected.max().item(), rel=1e-4
                )


def test_probes_do_not_change_the_moments():
    """Attention is another kernel then, so to roundoff."""
    one, examples = case("LlamaForCausalLM"), examples_of("LlamaForCausalLM")
    plain, probed = means_of(one.streamed(), examples), means_of(one.streamed(twice=True), examples, probes=1)
    for name, values in plain.items():
        assert probed[name].tolist() == pytest.approx(values.tolist(), abs=ROUNDOFF * values.max().item(), rel=1e-4)


def test_a_16_bit_run_is_near_a_float32_one():
    """bfloat16 keeps 8 bits: single gradients are off by percents, their mean squares on average by less."""
    one, examples = case("LlamaForCausalLM"), examples_of("LlamaForCausalLM")
    exact, rough = means_of(one.streamed(), examples), means_of(one.streamed(torch.bfloat16), examples)
    for name, values in exact.items():
        assert rough[name].dtype == torch.float32
        assert rough[name].mean().item() == pytest.approx(values.mean().item(), rel=0.1)


def test_a_16_bit_checkpoint_is_computed_in_float32():
    one, examples = case("LlamaForCausalLM", dtype=torch.bfloat16), examples_of("LlamaForCausalLM")
    model = one.streamed()
    assert {tensor.dtype for tensor in model.read_block("model.layers.0").values()} == {torch.float32}
    whole = transformers.AutoModelForCausalLM.from_pretrained(one.checkpoint.folder, dtype=torch.float32)
    one = replace(one, whole=whole)  # whose rotary embeddings, unlike those of a model that is cast, are float32
    (module, squares_OI), *_ = squared_gradients(one, examples).items()
    assert means_of(model, examples)[f"{module}.rows"].tolist() == pytest.approx(squares_OI.mean(1).tolist(), rel=1e-4)


def test_the_loss_is_that_of_transformers():
    for architecture in ("LlamaForCausalLM", "BertForSequenceClassification"):
        one, examples = case(architecture), examples_of(architecture)
        for example in examples:
            logits = one.whole(input_ids=torch.tensor([example.input_ids])).logits
            assert example.loss(logits).item() == pytest.approx(own_loss(one.whole, example).item(), rel=1e-6)
