"""LoRA-RITE against its formulas in NumPy float64, and what makes it one: its steps of B A need no certain B and A."""

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

RATE, DECAY, EPS = 0.01, 0.1, 1e-6
OUT, IN, RANK = 9, 7, 3
NEAR = 0.02  # of the bytes of a step: vectors are not counted
ROUNDOFF = 1e-9  # of float64 through inverses and roots; measured: 3e-13


def numbers(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def bias(beta, t):
    return beta * (1 - beta ** (t - 1)) / (1 - beta**t)


def inverse_root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return vectors @ np.diag(1 / (np.sqrt(np.maximum(values, 0)) + EPS)) @ vectors.T


class Reference:
    """The notes on the paper, line by line, with moments that are kept in the coordinates of the whole space.

    U V U^T and U M, out of the subspace of U projected onto it, need no rotation of a basis: any basis gives the same.
    """

    def __init__(self, up, down):
        self.up, self.down, self.t = up.copy(), down.copy(), 0
        self.second_up, self.second_down = np.zeros((IN, IN)), np.zeros((OUT, OUT))
        self.first_up, self.first_down = np.zeros((OUT, IN)), np.zeros((OUT, IN))

    def step(self, grad_up, grad_down):
        self.t += 1
        b1, b2 = bias(0.9, self.t), bias(0.999, self.t)
        inverse_up, inverse_down = np.linalg.pinv(self.up), np.linalg.pinv(self.down)  # R^+ U^T, and its like
        onto_up, onto_down = self.up @ inverse_up, inverse_down @ self.down  # U U^T
        part_down, part_up = inverse_up.T @ grad_down, grad_up @ inverse_down.T  # U U^T G and G U U^T: OUT x IN
        parts = [
            part if np.sqrt(np.sum(part**2) / (RANK * side)) <= 1 else 0 * part
            for part, side in ((part_down, IN), (part_up, OUT))
        ]
        norm = np.sqrt(sum(np.sum(part**2) for part in parts))
        part_down, part_up = (part / max(norm, 1) for part in parts)
        self.second_down = b2 * onto_up @ self.second_down @ onto_up + (1 - b2) * part_down @ part_down.T / IN
        self.second_up = b2 * onto_down @ self.second_up @ onto_down + (1 - b2) * part_up.T @ part_up / OUT
        scaled_down, scaled_up = inverse_root(self.second_down) @ part_down, part_up @ inverse_root(self.second_up)
        self.first_down = b1 * onto_up @ self.first_down + (1 - b1) * scaled_down
        self.first_up = b1 * self.first_up @ onto_down + (1 - b1) * scaled_up
        down, up = self.down, self.up
        self.down = down - RATE * (inverse_up @ self.first_down + DECAY * down)
        self.up = up - RATE * (self.first_up @ inverse_down + DECAY * up)


def pair_of(up, down, dtype=torch.float64):
    return tuple(torch.nn.Parameter(torch.tensor(factor, dtype=dtype)) for factor in (up, down))


def optimizer_of(up, down, **changes):
    return LoraRite([up, down], [(up, down)], **({"lr": RATE, "weight_decay": DECAY, "eps": EPS} | changes))


def step(optimizer, up, down, grad_up, grad_down):
    up.grad, down.grad = torch.tensor(grad_up, dtype=up.dtype), torch.tensor(grad_down, dtype=down.dtype)
    optimizer.step()


def gradients(seed, up, down, scale):
    """Those of a loss whose gradient of B A is random."""
    grad = scale * numbers(seed, OUT, IN)
    return grad @ down.T, up.T @ grad


@pytest.mark.parametrize("is_zero", [False, True], ids=["up", "up 0"])
@pytest.mark.parametrize("scale", [0.02, 0.5, 1.0], ids=["as they are", "clipped", "some left out"])
def test_steps_are_those_of_the_formulas(scale, is_zero):
    start = numbers(0, OUT, RANK) * (not is_zero), numbers(1, RANK, IN)
    up, down = pair_of(*start)
    optimizer, reference = optimizer_of(up, down), Reference(*start)
    for number in range(6):
        grads = gradients(2 + number, reference.up, reference.down, scale)
        reference.step(*grads)
        step(optimizer, up, down, *grads)
        np.testing.assert_allclose(up.detach(), reference.up, rtol=0, atol=ROUNDOFF)
        np.testing.assert_allclose(down.detach(), reference.down, rtol=0, atol=ROUNDOFF)
    assert np.abs(reference.down - start[1]).max() > RATE


def test_clipping_sees_all_pairs():
    starts = [(numbers(seed, OUT, RANK), numbers(seed + 1, RANK, IN)) for seed in (0, 2)]
    pairs = [pair_of(*start) for start in starts]
    optimizer = LoraRite([factor for pair in pairs for factor in pair], pairs, lr=RATE)
    for (up, down), start, scale in zip(pairs, starts, (0.5, 1e-3), strict=True):
        grads = gradients(4, *start, scale)
        up.grad, down.grad = map(torch.tensor, grads)
    optimizer.step()
    quiet = optimizer.state[pairs[1][1]]["second"]
    up, down = starts[1]
    parts = [1e-3 * numbers(4, OUT, IN), 0.5 * numbers(4, OUT, IN)]
    squares = [
        np.sum((u @ np.linalg.pinv(u) @ part) ** 2) + np.sum((part @ np.linalg.pinv(d) @ d) ** 2)
        for part, (u, d) in zip(parts, reversed(starts), strict=True)
    ]
    expected = np.sum((up @ np.linalg.pinv(up) @ parts[0]) ** 2) / IN / sum(squares)
    assert quiet.trace().item() == pytest.approx(expected, rel=ROUNDOFF)


def test_the_product_moves_alike_however_it_is_divided():
    turn = numbers(9, RANK, RANK) + 3 * np.eye(RANK)
    back = np.linalg.inv(turn)
    start = numbers(0, OUT, RANK), numbers(1, RANK, IN)
    one, two = pair_of(*start), pair_of(start[0] @ back, turn @ start[1])
    optimizers = [optimizer_of(*pair) for pair in (one, two)]
    for number in range(5):
        for pair, optimizer in zip((one, two), optimizers, strict=True):
            values = [factor.detach().numpy() for factor in pair]
            step(optimizer, *pair, *gradients(2 + number, *values, 0.1))
        products = [(up @ down).detach().numpy() for up, down in (one, two)]
        np.testing.assert_allclose(*products, rtol=0, atol=ROUNDOFF)
    assert np.abs(products[0] - start[0] @ start[1]).max() > RATE
    assert np.abs((one[1] - two[1]).detach().numpy()).max() > 0.1


def test_other_parameters_move_as_in_adamw():
    start, pair = torch.tensor(numbers(0, 5)), pair_of(numbers(1, OUT, RANK), numbers(2, RANK, IN))
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = (
        LoraRite([*pair, ours], [pair], lr=RATE, weight_decay=DECAY),
        torch.optim.AdamW([theirs], lr=RATE, weight_decay=DECAY),
    )
    for number in range(4):
        ours.grad = theirs.grad = torch.tensor(numbers(3 + number, 5))
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
    assert pair[0].equal(torch.tensor(numbers(1, OUT, RANK)))  # without gradients


def test_each_factor_has_the_rate_of_its_group():
    start, moved = (numbers(0, OUT, RANK), numbers(1, RANK, IN)), []
    for ratio in (1, 16):
        up, down = pair_of(*start)
        groups = [{"params": [down]}, {"params": [up], "lr": ratio * RATE}]
        step(LoraRite(groups, [(up, down)], lr=RATE), up, down, *gradients(2, *start, 0.1))
        moved.append([(factor.detach() - torch.tensor(first)) for factor, first in zip((up, down), start, strict=True)])
    torch.testing.assert_close(moved[1][0], 16 * moved[0][0])
    assert moved[1][1].equal(moved[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_goes_on_to_the_bit(dtype, tmp_path):
    alone = [
        *pair_of(numbers(0, OUT, RANK), numbers(1, RANK, IN), dtype),
        torch.nn.Parameter(torch.ones(5, dtype=dtype)),
    ]
    optimizer = LoraRite(alone, [tuple(alone[:2])], lr=RATE)

    def go(optimizer, parameters, number):
        for place, parameter in enumerate(parameters):
            parameter.grad = torch.tensor(0.1 * numbers(10 * number + place, *parameter.shape), dtype=dtype)
        optimizer.step()

    for number in range(2):
        go(optimizer, alone, number)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed = [torch.nn.Parameter(parameter.detach().clone()) for parameter in alone]
    other = LoraRite(resumed, [tuple(resumed[:2])], lr=1.0)
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for number in range(2, 5):
        go(optimizer, alone, number)
        go(other, resumed, number)
        assert all(map(torch.equal, alone, resumed))
    tensors = [value for state in other.state.values() for value in state.values() if torch.is_tensor(value)]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_and_the_most_of_a_step_are_as_planned(dtype):
    shapes = [((300, 16), (16, 200)), ((64, 8), (8, 1000))]
    pairs = [tuple(torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in pair) for pair in shapes]
    parameters = [factor for pair in pairs for factor in pair] + [torch.nn.Parameter(torch.ones(300, dtype=dtype))]
    optimizer, rounding = LoraRite(parameters, pairs, lr=RATE), Rounding(0, torch.device("cpu"))
    peaks = []
    for step in (1, 2):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        rounding.before_step(optimizer, step)
        with Tracker() as tracker:
            optimizer.step()
        peaks.append(tracker.peak)
    planned = optimizer_bytes("lora-rite", [TensorShape(tuple(p.shape), dtype) for p in parameters], on_gpu=True)
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t))
    assert (planned.device, planned.host) == (held, 0)
    assert peaks[0] - held == pytest.approx(planned.workspace, rel=NEAR)  # the first step makes the state
    assert peaks[1] == pytest.approx(planned.workspace, rel=NEAR)


def test_the_trainer_gives_it_the_pairs_and_the_rates_of_the_run(language, tmp_path):
    options = AdapterOptions("lora", rank=4, own={"lora_plus_ratio": 4.0})
    made = trainer(language, tmp_path, sequences(), settings(optimizer="lora-rite", weight_decay=0.1), options=options)
    made.train()
    optimizer, factors = made.optimizer.optimizer, trained(made.model)
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in factors.items():
        assert groups[parameter]["lr"] == made.args.learning_rate * (4 if name.endswith(".up") else 1)
        assert groups[parameter]["weight_decay"] == 0.1
        assert optimizer.state[parameter].keys() == {"step", "moment", "basis", "second"}


def test_magnitudes_of_dora_move_beside_the_pairs(language, tmp_path):
    made = trainer(
        language, tmp_path, sequences(), settings(optimizer="lora-rite"), options=AdapterOptions("dora", rank=4)
    )
    before = {name: parameter.detach().clone() for name, parameter in trained(made.model).items()}
    made.train()
    moved = {name for name, parameter in trained(made.model).items() if not parameter.equal(before[name])}
    assert moved == {name for name in before if not name.endswith("down")}  # B is 0 in the first step
