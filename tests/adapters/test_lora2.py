"""LoRA^2: which values are removed, what is kept near orthonormal, and the export, by NumPy and autograd in float64."""

import numpy as np
import pytest
import torch

from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.methods.hooks import Course
from qsvd.adapters.methods.lora2 import Lora2
from tests import reference
from tests.adapters.principals import principal_of

SHAPES, RANK, STEPS = ((40, 33), (17, 64)), 6, 12
BETA = {"beta1": 0.8, "beta2": 0.7}
OWN = {"target_rank": 2, "tinit": 2 / 12, "tfinal": 3 / 12, "delta_t": 2, **BETA}
SMALL = ("diagonal", "inner_up", "inner_down")


def pair(inner, **own):
    options = AdapterOptions("lora2", rank=RANK, alpha=3.0, own={**OWN, "inner_size": inner, **own})
    found = {}
    for number, shape in enumerate(SHAPES):
        generator = torch.Generator().manual_seed(number)
        found[str(number)] = adapter = Lora2.start(principal_of(shape, 4, seed=number), options, generator)
        with torch.no_grad():
            adapter.diagonal += torch.linspace(0.5, 1, RANK)
    return found


def number_of(*key):
    return sum(ord(letter) for letter in "".join(map(str, key)))


def give_gradients(adapters, step):
    for path, adapter in adapters.items():
        for name, parameter in adapter.named_parameters():
            drawn = reference.gaussian(1, parameter.numel(), seed=number_of(step, path, name))
            parameter.grad = torch.from_numpy(drawn).reshape(parameter.shape)


def kept_by_hand(adapters, step, moments):
    """The paper's scores after this step: of a value, and the means over the columns and rows of the inner factors."""
    scores = {}
    for path, adapter in adapters.items():
        score = {}
        for name in SMALL:
            parameter = adapter.get_parameter(name)
            now = np.abs(parameter.detach().double().numpy() * parameter.grad.double().numpy())
            mean, spread = moments.get((path, name), (np.zeros_like(now), np.zeros_like(now)))
            mean = BETA["beta1"] * mean + (1 - BETA["beta1"]) * now
            spread = BETA["beta2"] * spread + (1 - BETA["beta2"]) * np.abs(now - mean)
            moments[path, name] = mean, spread
            score[name] = mean * spread
        scores[path] = score["diagonal"] + score["inner_up"].mean(axis=0) + score["inner_down"].mean(axis=1)
    first, target, start, rest = 2 * RANK, 4, 2, 3
    left = 1 - (step - start) / (STEPS - rest - start)
    wanted = first if step <= start else target if step >= STEPS - rest else int(target + (first - target) * left**3)
    order = np.sort(np.concatenate([*scores.values()]))
    return {path: score > (order[first - wanted - 1] if wanted < first else -1) for path, score in scores.items()}


@pytest.mark.parametrize("stop", [None, 5, 10])
def test_values_are_removed_by_the_scores_of_the_small_parameters_alone(stop):
    """Also with hooks that were saved, and restored into new ones, after a step."""
    adapters, moments, kept = pair(4), {}, {}
    hooks = Lora2.hooks(adapters, Course(STEPS, 1e-2))
    assert {name.split()[1] for name in hooks.state()} == set(SMALL)
    for step in range(1, STEPS + 1):
        give_gradients(adapters, step)
        by_hand = kept_by_hand(adapters, step, moments)
        before = {path: adapter.diagonal.detach().clone() for path, adapter in adapters.items()}
        hooks.after_step(step)
        if step == stop:
            state = {name: tensor.clone() for name, tensor in hooks.state().items()}
            hooks = Lora2.hooks(adapters, Course(STEPS, 1e-2))
            hooks.restore(state)
        for path, adapter in adapters.items():
            found = (adapter.diagonal != 0).numpy()
            if step <= STEPS - 3 and (step % 2 == 0 or step == STEPS - 3) and step > 2:
                assert (found == by_hand[path]).all(), step
                kept[path] = found
            elif step > STEPS - 3:
                assert (found == kept[path]).all(), "the pattern stays"
            else:
                assert torch.equal(adapter.diagonal, before[path])
            with torch.no_grad():
                adapter.diagonal += 0.1  # as an optimizer moves them again
    assert sum(pattern.sum() for pattern in kept.values()) == 4


@pytest.mark.parametrize("inner", [4, 9])
def test_the_orthonormality_loss_is_the_mean_over_all_four_factors(inner):
    adapters = pair(inner, orthonormal_weight=0.3)
    exact = {}
    for path, adapter in adapters.items():
        for name, parameter in adapter.named_parameters():
            parameter.grad = torch.zeros_like(parameter)
            exact[path, name] = parameter.detach().double().requires_grad_()
    Lora2.hooks(adapters, Course(STEPS, 1e-2)).after_backward(1)
    norms = []
    for path in adapters:
        up, a, b, down = (exact[path, name] for name in ("up", "inner_up", "inner_down", "down"))
        grams = (down @ down.T, b.T @ b, a @ a.T, up.T @ up)
        norms += [torch.linalg.matrix_norm(gram - torch.eye(len(gram))) for gram in grams]
    (0.3 * sum(norms) / len(norms)).backward()
    for (path, name), point in exact.items():
        found = adapters[path].get_parameter(name).grad.double()
        wanted = torch.zeros_like(point) if name == "diagonal" else point.grad
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
        assert name == "diagonal" or wanted.abs().max() > 1e-4


@pytest.mark.parametrize(("inner", "columns"), [(2, (2, 2, 1, 0)), (4, (4, 3, 1, 0)), (9, (6, 3, 1, 0))])
def test_the_export_is_the_same_product_without_what_was_removed(inner, columns):
    adapter = pair(inner)["0"]
    with torch.no_grad():
        for number, parameter in enumerate(adapter.parameters()):
            step = reference.gaussian(1, parameter.numel(), seed=number)
            parameter += 0.3 * torch.from_numpy(step).reshape(parameter.shape)
        for removed, wanted in zip((0, 3, 5, 6), columns, strict=True):
            adapter.diagonal[:removed] = 0
            up, down = (factor.double() for factor in adapter.factors())
            slim_up, slim_down = (factor.double() for factor in adapter.exported())
            assert slim_up.shape[1] == len(slim_down) == 4 + wanted, "beside four components"
            torch.testing.assert_close(slim_up @ slim_down, up @ down, rtol=0, atol=1e-4)
