"""Steps of bfloat16 adapters: rounded up or down to a neighbour, right in the mean, the same when a run goes on."""

import copy

import bitsandbytes
import numpy as np
import pytest
import torch

from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.model import trained
from qsvd.plan.tensors import TensorShape, optimizer_bytes
from qsvd.training.lora_rite import LoraRite
from qsvd.training.updates import Rounding
from tests.memory.tracker import Tracker
from tests.runs import sequences, settings, trainer

CPU = torch.device("cpu")
RATE, DECAY = 2e-5, 0.1
MAKE = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=RATE, weight_decay=DECAY),
    "adamw_8bit": lambda ps: bitsandbytes.optim.AdamW8bit(ps, lr=RATE, weight_decay=DECAY),
    "lora-rite": lambda ps: LoraRite(ps, pairs=[], lr=RATE, weight_decay=DECAY),
}


def neighbours(exact):
    """The bfloat16 numbers around float32 values, by their bits, as float64."""
    bits = exact.view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(float), (bits + np.uint32(0x10000)).view(np.float32).astype(float)


def test_a_value_goes_to_a_neighbour_with_the_share_of_the_way_to_it():
    rounding, values = Rounding(3, CPU), torch.tensor([0.1, -0.1, 3.0, 1e-30, 250.3, 0.0, -0.0], dtype=torch.float32)
    rounding.generator.manual_seed(0)
    draws = 20_000
    written = torch.empty(draws, len(values), dtype=torch.bfloat16)
    rounding.write(written, values.repeat(draws, 1))
    low, high = neighbours(values.numpy())
    found = written.double().numpy()
    assert ((found == low) | (found == high)).all()
    share = (values.double().numpy() - low) / (high - low)
    assert np.abs((found == high).mean(axis=0) - share).max() < 5 * 0.5 / draws**0.5


def test_what_is_no_number_stays_and_float32_is_copied():
    rounding, odd = Rounding(0, CPU), torch.tensor([torch.inf, -torch.inf, torch.nan])
    short, long = torch.empty(3, dtype=torch.bfloat16), torch.empty(3)
    rounding.write(short, odd.clone())
    rounding.write(long, odd / 3)
    assert str(short.tolist()) == str(long.tolist()) == "[inf, -inf, nan]"


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
@pytest.mark.parametrize("name", MAKE)
def test_many_small_steps_move_as_far_as_in_float32(name):
    """A step is 2e-5, half the distance of two numbers 2e-4: without rounding up nothing would move."""
    torch.manual_seed(0)
    start = (0.06 + 0.03 * torch.rand(64, 128)).bfloat16()
    exact, short = torch.nn.Parameter(start.float()), torch.nn.Parameter(start.clone())
    plain = torch.nn.Parameter(start.clone())
    optimizers = [MAKE[name]([parameter]) for parameter in (exact, short, plain)]
    rounding = Rounding(0, CPU)
    for step in range(1, 51):
        gradient = torch.randn(1, 128).expand(64, 128) * 0.1 + 1
        for parameter in (exact, short, plain):
            parameter.grad = gradient.to(parameter.dtype).clone()
        rounding.before_step(optimizers[1], step)
        for optimizer in optimizers:
            optimizer.step()
        rounding.after_step()
    far = (exact - start.float()).mean().item()
    assert far < -8e-4
    assert (short.float() - start.float()).mean().item() == pytest.approx(far, rel=0.03)
    assert torch.equal(plain, start), "the optimizer alone"


def test_a_decay_without_a_gradient_decays_in_the_mean():
    start = torch.full((256, 256), 0.1).bfloat16()
    parameter = torch.nn.Parameter(start.clone())
    parameter.grad = torch.zeros_like(parameter)
    optimizer, rounding = torch.optim.AdamW([parameter], lr=1e-2, weight_decay=DECAY), Rounding(0, CPU)
    rounding.before_step(optimizer, 1)
    optimizer.step()
    rounding.after_step()
    assert parameter.double().mean().item() == pytest.approx(start[0, 0].item() * (1 - 1e-3), rel=1e-4)


def test_the_draws_are_those_of_the_seed_and_the_step():
    def moved(seed, step):
        parameter = torch.nn.Parameter(torch.full((8, 8), 0.1).bfloat16())
        parameter.grad = torch.ones_like(parameter)
        optimizer, rounding = MAKE["adamw"]([parameter]), Rounding(seed, CPU)
        torch.rand(step)  # what others draw changes nothing
        rounding.before_step(optimizer, step)
        optimizer.step()
        rounding.after_step()
        return copy.deepcopy(parameter.detach())

    assert torch.equal(moved(1, 5), moved(1, 5))
    assert not torch.equal(moved(1, 5), moved(1, 6))
    assert not torch.equal(moved(1, 5), moved(2, 5))


def test_the_rounding_takes_the_bytes_that_are_planned():
    shapes = [(200, 16), (16, 1000), (300,)]
    parameters = [torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer, rounding = MAKE["adamw_8bit"](parameters), Rounding(0, CPU)
    with Tracker() as tracker:
        rounding.before_step(optimizer, 1)
        rounding.after_step()
    planned = optimizer_bytes("adamw_8bit", [TensorShape(shape, torch.bfloat16) for shape in shapes], on_gpu=False)
    assert tracker.peak <= planned.workspace <= 1.05 * tracker.peak


@pytest.mark.parametrize("optimizer", ["adamw", "lora-rite"])
def test_a_trainer_moves_numbers_of_which_a_step_is_less_than_half_their_distance(language, tmp_path, optimizer):
    chosen = settings(optimizer=optimizer, learning_rate=1e-6)
    made = trainer(language, tmp_path, sequences(), chosen, options=AdapterOptions("pissa", dtype="bfloat16"))
    before = {name: parameter.detach().clone() for name, parameter in trained(made.model).items()}
    made.train()
    moved = 0
    for name, parameter in trained(made.model).items():
        assert parameter.dtype == torch.bfloat16
        moved += ((parameter != before[name]) & (before[name].abs() > 0.01)).sum().item()
    assert moved > 0
