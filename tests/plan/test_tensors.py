"""What optimizers keep, by their own state after a step, around the sizes at which bitsandbytes changes it."""

import bitsandbytes
import pytest
import torch

from qsvd.plan.tensors import OptimizerBytes, TensorShape, optimizer_bytes, small_state

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


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
@pytest.mark.parametrize("size", [4095, 4096, 99_999, 100_000])
def test_it_is_said_where_bitsandbytes_keeps_32_bits_or_does_not_page(monkeypatch, name, size):
    paged = []
    monkeypatch.setattr("bitsandbytes.functional.get_paged", lambda *shape, **_: paged.append(shape) or torch.ones(1))
    monkeypatch.setattr("bitsandbytes.functional.fill", lambda *_: None)
    parameter = torch.nn.Parameter(torch.empty(size, device="meta"))  # not on a CPU, where nothing is paged
    optimizer = MAKERS[name]([parameter])
    monkeypatch.setattr(optimizer, "name2qmap", {key: torch.empty(256) for key in ("dynamic", "udynamic")})
    optimizer.init_state({**optimizer.defaults, "params": [parameter]}, parameter, 0, 0)
    state = optimizer.state[parameter]
    is_exact = "absmax1" not in state and "8bit" in name
    found = small_state(name, [TensorShape((size,), torch.float32)], on_gpu=True) or ""
    assert ("1 have fewer than 4,096 elements, so their state is kept in 32 bits" in found) == is_exact
    assert ("1 have fewer than 100,000 elements, so their state is not paged" in found) == (
        "paged" in name and not paged
    )
    assert (found == "") == (size == 100_000 or (name == "adamw_8bit" and size >= 4096))


def test_few_small_tensors_and_a_cpu_need_no_word():
    shapes = [TensorShape((size,), torch.float32) for size in (64, 4096, 10**5, 10**5)]
    assert small_state("paged_adamw_8bit", shapes[1:], on_gpu=True) is None
    assert small_state("paged_adamw_32bit", shapes[:1], on_gpu=False) is None
    assert small_state("adamw", shapes[:1], on_gpu=True) is None
    said = small_state("paged_adamw_8bit", shapes, on_gpu=True)
    assert said == (
        "Of 4 trained tensors 2 have fewer than 100,000 elements, so their state is not paged (rules of bitsandbytes)."
    )


def test_torch_takes_roots_of_everything_at_once_on_a_gpu():
    shapes = [TensorShape((10, 10), torch.float32), TensorShape((30,), torch.bfloat16)]
    before = 60  # bytes of the values that are rounded after the step
    assert optimizer_bytes("adamw", shapes, on_gpu=True) == OptimizerBytes(2 * 460, 2 * 4, 460 + before)
    assert optimizer_bytes("adamw", shapes, on_gpu=False).workspace == 2 * 400 + before
    assert optimizer_bytes("adamw", [], on_gpu=False) == OptimizerBytes(0, 0, 0)
