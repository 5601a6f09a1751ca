"""DoRA, VeRA, AdaLoRA and Kron-LoRA, judged by PEFT: the same weights in, the same outputs and gradients.

Of AdaLoRA the same removed triplets, too.
"""

import copy

import peft
import pytest
import torch
from torch import nn

from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.linear import SplitLinear
from qsvd.adapters.methods.hooks import Course
from qsvd.adapters.methods.table import METHODS
from tests import reference
from tests.adapters.principals import decoded, principal_of

SIZES, RANK, TOKENS = ((70, 128), (48, 70)), 6, 9  # of two layers, one after the other
CONFIGS = {
    "dora": peft.LoraConfig(r=RANK, lora_alpha=3, use_dora=True, target_modules=["0", "1"]),
    "vera": peft.VeraConfig(r=RANK, d_initial=0.7, target_modules=["0", "1"]),
    "adalora": peft.AdaLoraConfig(
        init_r=RANK, target_r=2, tinit=2, tfinal=3, deltaT=2, beta1=0.8, beta2=0.7, orth_reg_weight=0.1,
        total_step=12, lora_alpha=3, target_modules=["0", "1"],
    ),
    "kron-lora": peft.LoKrConfig(r=RANK, alpha=3, decompose_factor=2, target_modules=["0", "1"]),
}  # fmt: skip
OWN = {
    "vera": {"d_initial": 0.7},
    "adalora": {
        "target_rank": 2, "tinit": 2 / 12, "tfinal": 3 / 12, "delta_t": 2, "beta1": 0.8, "beta2": 0.7,
        "orthonormal_weight": 0.1,
    },
    "kron-lora": {"kron_out": 2, "kron_in": 2},
}  # fmt: skip
NAMES = {  # ours -> PEFT's
    "dora": {"up": "lora_B", "down": "lora_A", "magnitude": "lora_magnitude_vector"},
    "vera": {"b": "vera_lambda_b", "d": "vera_lambda_d"},
    "adalora": {"up": "lora_B", "down": "lora_A", "diagonal": "lora_E"},
    "kron-lora": {"kron": "lokr_w1", "up": "lokr_w2_a", "down": "lokr_w2_b"},
}


def tensor(*shape, seed):
    return torch.from_numpy(reference.gaussian(*shape, seed=seed))


def theirs_of(layer, name):
    found = getattr(layer, name)["default"]
    return found if isinstance(found, nn.Parameter) else found.weight


class Head(nn.Module):
    """Two layers and a loss, as PEFT's AdaLoRA wants them."""

    def __init__(self, layers):
        super().__init__()
        self.config = None
        for number, layer in enumerate(layers):
            self.add_module(str(number), layer)

    def forward(self, x):
        y = self.get_submodule("1")(torch.tanh(self.get_submodule("0")(x)))
        return {"loss": y.square().sum() / 50, "y": y}


def ours_and_pefts(method, *, seed=4):
    """The same two layers, with components in ours; the trained parameters have moved."""
    ours, bases = [], []
    for number, shape in enumerate(SIZES):
        principal = principal_of(shape, 4, seed=number)
        options = AdapterOptions(method, rank=RANK, alpha=None if method == "vera" else 3.0, own=OWN.get(method, {}))
        adapter = METHODS[method].start(principal, options, torch.Generator().manual_seed(number))
        ours.append(SplitLinear(principal.residual, adapter, None))
        base = nn.Linear(shape[1], shape[0], bias=False)
        base.weight.data = (decoded(principal.residual) + principal.up_OR.double() @ principal.down_RI.double()).float()
        bases.append(base)
    model = peft.get_peft_model(Head(bases), copy.deepcopy(CONFIGS[method]))  # PEFT writes into it
    with torch.no_grad():
        for number, linear in enumerate(ours):
            theirs = model.base_model.model.get_submodule(str(number))
            if method == "vera":  # one pair for both layers there, cut to the sizes of each
                linear.adapter.shared_up = theirs.vera_B["default"][: SIZES[number][0]]
                linear.adapter.shared_down = theirs.vera_A["default"][:, : SIZES[number][1]]
            for name, other in NAMES[method].items():
                parameter = linear.adapter.get_parameter(name)
                step = tensor(1, parameter.numel(), seed=seed + number).reshape(parameter.shape)
                parameter += 0.1 * step * (parameter.abs().mean() or 1)
                theirs_of(theirs, other).copy_(parameter.reshape(theirs_of(theirs, other).shape))
    return Head(ours).train(), model.train()


def gradients(model, method, *, is_ours):
    found = {}
    for number in range(2):
        layer = model.get_submodule(str(number)) if is_ours else model.base_model.model.get_submodule(str(number))
        for name, other in NAMES[method].items():
            parameter = layer.adapter.get_parameter(name) if is_ours else theirs_of(layer, other)
            found[f"{number} {name}"] = parameter.grad.reshape(-1)
    return found


@pytest.mark.parametrize("method", NAMES)
def test_outputs_and_gradients_are_pefts(method):
    ours, theirs = ours_and_pefts(method)
    x = tensor(TOKENS, SIZES[0][1], seed=5)
    mine, other = ours(x), theirs.base_model.model(x)
    torch.testing.assert_close(mine["y"], other["y"], rtol=0, atol=1e-4 * other["y"].abs().max().item())
    mine["loss"].backward()
    other["loss"].backward()
    exact = gradients(theirs, method, is_ours=False)
    for name, gradient in gradients(ours, method, is_ours=True).items():
        torch.testing.assert_close(gradient, exact[name], rtol=0, atol=1e-4 * exact[name].abs().max().item(), msg=name)


LAST = 12 - 3  # step of the last removal; PEFT then has smaller parameters, which its optimizer lacks


def values_of(ours):
    return [ours.get_submodule(str(number)).adapter.diagonal for number in range(2)]


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")  # PEFT's own keys
@pytest.mark.parametrize("stop", [None, 5, 11])
def test_adalora_moves_and_removes_triplets_as_peft_does(stop):
    """After all of 12 steps, and with hooks that were saved, and restored into new ones, after one of them."""
    ours, theirs = ours_and_pefts("adalora")
    adapters = {str(number): ours.get_submodule(str(number)).adapter for number in range(2)}
    hooks = METHODS["adalora"].hooks(adapters, Course(12, 1e-2))
    mine, other = (
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2) for model in (ours, theirs)
    )
    removed, kept = set(), {}
    for step in range(1, 13):
        x = tensor(TOKENS, SIZES[0][1], seed=100 + step)
        mine.zero_grad()
        ours(x)["loss"].backward()
        hooks.after_backward(step)
        mine.step()
        hooks.after_step(step)
        if step <= LAST:
            other.zero_grad()
            theirs(x)["loss"].backward()  # PEFT adds the orthonormality loss to it
            other.step()
            theirs.base_model.update_and_allocate(step)
        if step == stop:
            state = {name: tensor.clone() for name, tensor in hooks.state().items()}
            hooks = METHODS["adalora"].hooks(adapters, Course(12, 1e-2))
            hooks.restore(state)
        for number, values in enumerate(values_of(ours)):
            exact = theirs_of(theirs.base_model.model.get_submodule(str(number)), "lora_E").flatten()
            if step <= LAST:
                assert torch.equal(values == 0, exact == 0), step
                torch.testing.assert_close(values, exact, rtol=1e-3, atol=1e-5)
                kept[number] = values != 0
            else:
                assert torch.equal(values != 0, kept[number]), "the pattern stays"
        removed.add(sum(int((values == 0).sum()) for values in values_of(ours)))
    assert {0, 8} <= removed
    assert len(removed) > 2, "the budget falls from 12 triplets to 4 step by step"
    up, down = adapters["0"].exported()
    assert up.shape[1] == len(down) == 4 + int((values_of(ours)[0] != 0).sum()), "removed triplets are not exported"


def test_adalora_leaves_the_scores_of_an_expert_without_tokens_as_they_are():
    ours, _ = ours_and_pefts("adalora")
    adapters = {str(number): ours.get_submodule(str(number)).adapter for number in range(2)}
    hooks = METHODS["adalora"].hooks(adapters, Course(12, 1e-2))
    ours.get_submodule("0")(tensor(TOKENS, SIZES[0][1], seed=5)).sum().backward()
    hooks.after_backward(1)
    hooks.after_step(1)
    state = hooks.state()
    assert state["0 up importance"].abs().max() > 0
    assert not state["1 up importance"].any()
