"""What optimizers keep, by their own state after a step, around the sizes at which bitsandbytes changes it."""

import bitsandbytes
import pytest
import torch

from qsvd.plan.tensors import OptimizerBytes, TensorShape, optimizer_bytes

SIZES = [(1,), (255,), (256,), (4095,), (4096,), (4097,), (64, 65), (300, 1000)]
MAKERS = {
    "adamw": torch.optim.AdamW,
    "adamw_8bit": bitsandbytes.optim.AdamW8bit,
    "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
    "paged_adamw_32bit": bitsandbytes.optim.PagedAdamW32bit,
}


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [SIZES, SIZES[:4]], ids=["all", "small"])
@pytest.mark.parametrize("name", MAKERS)
def test_state_is_what_a_real_optimizer_has(name, sizes, dtype):
    parameters = [torch.nn.Parameter(torch.ones(size, dtype=dtype)) for size in sizes]
    optimizer = MAKERS[name](parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    held = {t.untyped_storage().data_ptr(): t.nbytes for t in tensors}
    planned = optimizer_bytes(name, [TensorShape(size, dtype) for size in sizes], on_gpu=False)
    assert planned.device + planned.host == sum(held.values())


def test_torch_takes_roots_of_everything_at_once_on_a_gpu():
    shapes = [TensorShape((10, 10), torch.float32), TensorShape((30,), torch.bfloat16)]
    assert optimizer_bytes("adamw", shapes, on_gpu=True) == OptimizerBytes(2 * 460, 2 * 4, 460)
    assert optimizer_bytes("adamw", shapes, on_gpu=False).workspace == 2 * 400
    assert optimizer_bytes("adamw", [], on_gpu=False) == OptimizerBytes(0, 0, 0)
