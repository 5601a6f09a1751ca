"""Steps of bfloat16 adapters on a GPU, by the optimizers of bitsandbytes: as far as in float32, and the same again."""

import bitsandbytes
import pytest
import torch

from qsvd.training.updates import Rounding

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

RATE, STEPS = 2e-5, 50


def moved(kind, dtype):
    torch.manual_seed(0)
    start = (0.06 + 0.03 * torch.rand(256, 256, device="cuda")).bfloat16()
    parameter = torch.nn.Parameter(start.to(dtype, copy=True))
    optimizer, rounding = kind([parameter], lr=RATE, weight_decay=0.1), Rounding(0, parameter.device)
    for step in range(1, STEPS + 1):
        parameter.grad = (torch.randn(256, 256, device="cuda") * 0.1 + 1).to(dtype)
        rounding.before_step(optimizer, step)
        optimizer.step()
        rounding.after_step()
    return (parameter.float() - start.float()).detach()


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "PagedAdamW32bit"])
def test_many_small_steps_move_as_far_as_in_float32(name):
    kind = getattr(bitsandbytes.optim, name)
    far = moved(kind, torch.float32).mean().item()
    short = moved(kind, torch.bfloat16)
    assert far < -8e-4
    assert short.mean().item() == pytest.approx(far, rel=0.03)
    assert torch.equal(short, moved(kind, torch.bfloat16))
