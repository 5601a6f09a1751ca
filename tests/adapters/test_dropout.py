"""LoRA's dropout, judged by PEFT: the same weights and the same draws give the same outputs and gradients."""

import peft
import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.utils.checkpoint import checkpoint

from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.linear import SplitLinear
from qsvd.adapters.methods.lora import Lora
from tests import reference
from tests.adapters.principals import decoded, principal_of

SHAPE, RANK, TOKENS = (70, 172), 5, 9
P = 0.3


def tensor(*shape, seed):
    return torch.from_numpy(reference.gaussian(*shape, seed=seed))


def ours_and_pefts(stored_rank, *, rslora=False):
    """SplitLinear, and PEFT's layer over nn.Linear(Q + B0 A0), with the same trained factors."""
    principal = principal_of(SHAPE, stored_rank)
    options = AdapterOptions("lora", rank=RANK, alpha=3.0, dropout=P, rslora=rslora)
    adapter = Lora.start(principal, options, torch.Generator().manual_seed(0))
    with torch.no_grad():
        adapter.up.copy_(tensor(SHAPE[0], RANK, seed=4))
    base = nn.Linear(SHAPE[1], SHAPE[0])
    with torch.no_grad():
        base.weight.copy_(decoded(principal.residual) + principal.up_OR.double() @ principal.down_RI.double())
    ours = SplitLinear(principal.residual, adapter, base.bias.detach().clone())
    config = LoraConfig(r=RANK, lora_alpha=3, lora_dropout=P, use_rslora=rslora, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(base), config)
    layer = theirs.base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(adapter.down)
        layer.lora_B["default"].weight.copy_(adapter.up)
    return ours.train(), layer.train()


def run(call, x, seed=8):
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    y = call(x)
    y.backward(tensor(*y.shape[1:], seed=6).reshape(y.shape))
    return y.detach(), x.grad


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("stored_rank", [0, 4])
def test_outputs_and_gradients_are_pefts_with_the_same_draws(stored_rank, rslora):
    ours, theirs = ours_and_pefts(stored_rank, rslora=rslora)
    x = tensor(TOKENS, SHAPE[1], seed=5)[None]
    y, dx = run(ours, x)
    expected, expected_dx = run(theirs, x)
    torch.testing.assert_close(y, expected, rtol=0, atol=2e-4 * expected.abs().max().item())
    torch.testing.assert_close(dx, expected_dx, rtol=0, atol=2e-4 * expected_dx.abs().max().item())
    pairs = [(ours.adapter.up, theirs.lora_B["default"].weight), (ours.adapter.down, theirs.lora_A["default"].weight)]
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=2e-4 * other.grad.abs().max().item())
    assert not torch.equal(run(ours, x, seed=9)[0], y), "another seed draws another mask"
    assert torch.equal(ours.eval()(x), ours(x)), "no dropout in evaluation"


def test_a_checkpointed_layer_draws_its_mask_again():
    ours, _ = ours_and_pefts(4)
    x = tensor(TOKENS, SHAPE[1], seed=5)[None]
    plain = [*run(ours, x), ours.adapter.down.grad.clone()]
    ours.zero_grad()
    again = [*run(lambda x: checkpoint(ours, x, use_reentrant=False), x), ours.adapter.down.grad]
    assert all(map(torch.equal, plain, again))
