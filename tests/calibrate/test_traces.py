"""Probes against autograd's own Hessian products on the whole model, and traces against the exact diagonal."""

import pytest
import torch
from torch.func import functional_call

from qsvd.calibrate.sums import Sums, means
from qsvd.calibrate.walk import Probes
from qsvd.plan import rules
from tests.calibrate.cases import CPU, case, examples_of, inputs_of, means_of

ROUNDOFF = 64 * 2.0**-24  # of |v * Hv|, float32; transformers keeps norms and softmax in float32 in any dtype
FAMILIES = (
    "LlamaForCausalLM",
    "GPTNeoXForCausalLM",
    "Gemma2ForCausalLM",
    "BloomForCausalLM",
    "BertForSequenceClassification",
)


def loss_in_weights(one, example):
    """The loss as a function of the weights that are split, and these weights, with attention that bends twice."""
    one.whole.set_attn_implementation("eager")
    names = [f"{spec.module}.weight" for spec in one.plan.weights]
    weights = tuple(one.whole.get_parameter(name).detach() for name in names)

    def loss(*changed):
        replaced = dict(zip(names, changed, strict=True))
        logits = functional_call(one.whole, replaced, (), inputs_of(example)).logits
        return example.loss(logits)

    return loss, weights


@pytest.mark.parametrize("architecture", FAMILIES)
def test_one_probe_is_a_product_with_the_whole_hessian(architecture):
    """All weights move at once: off-diagonal parts of H reach every sample, as they do in autograd's H v."""
    one, (example, *_) = case(architecture), examples_of(architecture)
    found = means_of(one.streamed(twice=True), [example], probes=1, seed=5)
    loss, weights = loss_in_weights(one, example)
    modules = [spec.module for spec in one.plan.weights]
    signs = tuple(Probes(1, 5).signs(module, 0, weight) for module, weight in zip(modules, weights, strict=True))
    _, products = torch.autograd.functional.hvp(loss, weights, signs)
    for module, sign, product in zip(modules, signs, products, strict=True):
        along = (sign * product).double()
        tolerance = ROUNDOFF * along.norm().item() * along.numel() ** 0.25
        assert found[f"{module}.trace"].item() == pytest.approx(along.sum().item(), abs=tolerance)
        assert found[f"{module}.trace_error"].item() == float("inf")  # of a single sample


@pytest.mark.parametrize(("repeats", "probes"), [(2, 1), (1, 2)])
def test_every_probe_of_every_example_has_signs_of_its_own(repeats, probes):
    """The same text twice, or two probes of one text, give two samples that differ."""
    one, (example, *_) = case("LlamaForCausalLM"), examples_of("LlamaForCausalLM")
    found = means_of(one.streamed(twice=True), [example] * repeats, probes=probes)
    assert all(found[f"{spec.module}.trace_error"].item() > 0 for spec in one.plan.weights)


def test_no_two_samples_share_their_signs(monkeypatch):
    one, (example, *_) = case("LlamaForCausalLM"), examples_of("LlamaForCausalLM")
    numbers, signs = set(), Probes.signs
    monkeypatch.setattr(Probes, "signs", lambda probes, *of: numbers.add(of[1]) or signs(probes, *of))
    means_of(one.streamed(twice=True), [example] * 3, probes=2)
    assert numbers == set(range(6))


def test_the_mean_of_many_probes_is_the_trace_within_its_error(monkeypatch):
    """The exact trace is the sum of the diagonal of H, number by number, by autograd: of small layers."""
    monkeypatch.setattr(rules, "LEAST_SIDE", 2)
    options = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
    one, examples = case("LlamaForCausalLM", **options), examples_of("LlamaForCausalLM", lengths=(6, 8))
    found = means_of(one.streamed(twice=True), examples, probes=60)
    exact = {}
    for example in examples:
        loss, weights = loss_in_weights(one, example)
        for number, spec in enumerate(one.plan.weights):
            trace = torch.autograd.functional.hessian(
                lambda weight, at=number, f=loss, w=weights: f(*w[:at], weight, *w[at + 1 :]),
                weights[number],
                vectorize=True,
            )
            size = weights[number].numel()
            exact[spec.module] = exact.get(spec.module, 0.0) + trace.reshape(size, size).trace().item() / len(examples)
    misses = [
        (found[f"{module}.trace"].item() - trace) / found[f"{module}.trace_error"].item()
        for module, trace in exact.items()
    ]
    assert len(misses) == 14
    assert max(map(abs, misses)) < 4
    assert sum(miss**2 for miss in misses) / len(misses) < 2.5  # 1 on average, were the samples normal


def test_the_error_is_the_standard_error_of_the_samples():
    (spec, *_) = case("LlamaForCausalLM").plan.weights
    sums, samples = Sums.empty([spec], CPU, has_traces=True), torch.tensor([3.0, -1.0, 7.0, 2.5], dtype=torch.float64)
    for number in (0, 1):  # two examples of two probes
        sums.add_loss(1.0)
        for sample in samples[2 * number : 2 * number + 2]:
            sums.add_trace(spec.module, sample.item())
    found = means(sums, [spec], 2)
    assert found[f"{spec.module}.trace"].item() == pytest.approx(samples.mean().item(), rel=1e-6)
    assert found[f"{spec.module}.trace_error"].item() == pytest.approx(samples.std().item() / 2, rel=1e-6)


def test_signs_are_of_a_module_a_number_and_a_seed_and_even():
    like = torch.zeros(40, 50)
    first = Probes(1, 3).signs("layers.0.q", 2, like)
    assert first.abs().eq(1).all()
    assert abs(first.mean().item()) < 5 / 2000**0.5
    assert torch.equal(first, Probes(4, 3).signs("layers.0.q", 2, like))
    others = [
        Probes(1, 4).signs("layers.0.q", 2, like),
        Probes(1, 3).signs("layers.0.k", 2, like),
        Probes(1, 3).signs("layers.0.q", 1, like),
    ]
    assert all(abs((first * other).mean().item()) < 5 / 2000**0.5 for other in others)


def test_a_block_that_cannot_be_differentiated_twice_is_refused():
    """Fused attention, which `twice` leaves out."""
    one = case("LlamaForCausalLM")
    with pytest.raises(ValueError, match=r"^model.layers.0 cannot be differentiated twice \(.*\); leave --traces out$"):
        means_of(one.streamed(), examples_of("LlamaForCausalLM"), probes=1)
