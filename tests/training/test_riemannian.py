"""Riemannian preconditioning against its formulas in NumPy float64 and PEFT's, and where the trainer applies it."""

import numpy as np
import peft
import pytest
import torch
from peft.optimizers import create_riemannian_optimizer

from qsvd.adapters.methods.hooks import Hooks
from qsvd.adapters.methods.pissa import Pissa
from qsvd.errors import BadInput
from qsvd.options import Plan
from qsvd.prepare.plan import prepare_plan
from qsvd.prepare.train import prepare_train
from qsvd.training.updates import Riemannian
from tests.runs import sequences, settings, trainer, training

OUT, IN, RANK, DAMPING = 9, 7, 3, 0.01
WITHOUT = (
    "edora",
    "lora-xs",
    "sorsa",
    "vera",
    "lora-fa",
    "adalora",
    "melora",
    "kron-lora",
    "singlora",
    "symlora",
    "lora-mini",
    "cora",
    "lorta",
    "lora2",
    "losa",
    "xgblora",
)


def numbers(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def by_formula(up, down, grad_up, grad_down, damping):
    eye = np.eye(len(down))
    inverse_up, inverse_down = np.linalg.inv(up.T @ up + damping * eye), np.linalg.inv(down @ down.T + damping * eye)
    return grad_up @ inverse_down, inverse_up @ grad_down


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_formulas(dtype):
    roundoff = max(1e-13, 32 * torch.finfo(dtype).eps) if dtype != torch.bfloat16 else 2**-8
    values = [numbers(0, OUT, RANK), numbers(1, RANK, IN), numbers(2, OUT, RANK), numbers(3, RANK, IN)]
    up, down, grad_up, grad_down = (torch.tensor(value, dtype=dtype) for value in values)
    expected = by_formula(*(tensor.double().numpy() for tensor in (up, down, grad_up, grad_down)), DAMPING)
    pair = torch.nn.Parameter(up), torch.nn.Parameter(down)
    pair[0].grad, pair[1].grad = grad_up, grad_down
    Riemannian([pair], DAMPING).transform_grads()
    for factor, wanted in zip(pair, expected, strict=True):
        np.testing.assert_allclose(factor.grad.double(), wanted, rtol=roundoff, atol=roundoff * np.abs(wanted).max())


def test_steps_are_those_of_peft():
    """Both take the factors before the step for both gradients."""
    model = torch.nn.Sequential(torch.nn.Linear(IN, OUT, bias=False)).double()
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules=["0"]))
    factors = {name.split(".")[-3]: p for name, p in theirs.named_parameters() if p.requires_grad}
    factors["lora_B"].data.copy_(torch.tensor(numbers(0, OUT, RANK)))
    pair = tuple(torch.nn.Parameter(factors[name].detach().clone()) for name in ("lora_B", "lora_A"))
    optimizers = [
        create_riemannian_optimizer(theirs, torch.optim.SGD, lr=0.1, reg=DAMPING),
        torch.optim.SGD(pair, lr=0.1),
    ]
    for number in range(3):
        for factor, their in zip(pair, (factors["lora_B"], factors["lora_A"]), strict=True):
            factor.grad = torch.tensor(numbers(3 + number, *factor.shape))
            their.grad = factor.grad.clone()
        Riemannian([pair], DAMPING).transform_grads()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(pair[0], factors["lora_B"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(pair[1], factors["lora_A"], rtol=1e-10, atol=1e-12)


def test_a_pair_without_gradients_is_passed_over():
    pair = torch.nn.Parameter(torch.ones(OUT, RANK)), torch.nn.Parameter(torch.ones(RANK, IN))
    Riemannian([pair], DAMPING).transform_grads()
    assert pair[0].grad is None
    assert pair[1].grad is None


class Halve(Hooks):
    """A method that halves the gradients; it keeps what the factors and their gradients then are."""

    seen: list

    def transform_grads(self, step):
        del step
        for adapter in self.adapters.values():
            for factor in adapter.pair():
                factor.grad.mul_(0.5)
            self.seen.append([t.detach().double().numpy().copy() for p in adapter.pair() for t in (p, p.grad)])


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(("optimizer", "moment"), [("adamw", "exp_avg"), ("paged_adamw_32bit", "state1")])
def test_the_optimizer_gets_clipped_gradients_of_the_hooks_preconditioned(
    language, tmp_path, monkeypatch, optimizer, moment
):
    monkeypatch.setattr(Halve, "seen", [], raising=False)
    monkeypatch.setattr(Pissa, "hooks", Halve)
    chosen = settings(optimizer=optimizer, precondition="riemannian", damping=DAMPING, max_grad_norm=0.01)
    made = trainer(language, tmp_path, sequences(), chosen)
    made.train()
    halves = [grad for _, grad_up, _, grad_down in Halve.seen for grad in (grad_up, grad_down)]
    assert np.sqrt(sum(np.sum(grad**2) for grad in halves)) == pytest.approx(0.005, rel=1e-3)
    for adapter, (up, grad_up, down, grad_down) in zip(made.hooks.adapters.values(), Halve.seen, strict=True):
        expected = by_formula(up, down, grad_up, grad_down, DAMPING)
        for factor, wanted in zip(adapter.pair(), expected, strict=True):
            found = made.optimizer.state[factor][moment].double().numpy() / 0.1  # of the first step
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("method", WITHOUT)
def test_methods_without_a_pair_refuse_before_the_data_are_read(language, texts, tmp_path, monkeypatch, method):
    monkeypatch.setattr("qsvd.prepare.train.read_run_data", None)
    for name, value in {"precondition": "riemannian", "optimizer": "lora-rite"}.items():
        able = r"\(pissa, lora, dora, lora-ga, delta-lora and 1 more\)"
        sentence = rf"--{name} {value} needs a method that .* {able}, and --method is {method}: "
        with pytest.raises(BadInput, match=sentence):
            prepare_train(training(language, texts, tmp_path / "run", method=method, **{name: value}))
        with pytest.raises(BadInput, match=sentence):
            prepare_plan(Plan(str(language), method=method, **{name: value}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"damping": 0.01}, "--damping 0.01 is for --precondition riemannian: give it too, or leave it out"),
        (
            {"precondition": "riemannian", "optimizer": "lora-rite"},
            "--optimizer lora-rite preconditions by itself: leave out --precondition riemannian",
        ),
        ({"precondition": "riemannian", "damping": 0.0}, "--damping 0.0 is not a finite number above 0"),
    ],
)
def test_options_that_exclude_each_other_are_refused(language, texts, tmp_path, changes, sentence):
    with pytest.raises(BadInput, match=sentence):
        prepare_train(training(language, texts, tmp_path / "run", **changes))
