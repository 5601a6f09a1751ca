"""Where a method may act: each hook once an optimizer step, between the right neighbours."""

import pytest
import torch

from qsvd.adapters.methods.hooks import Hooks
from qsvd.adapters.methods.pissa import Pissa
from qsvd.adapters.methods.table import METHODS
from qsvd.adapters.model import trained
from tests.runs import sequences, settings, trainer

ROUNDOFF = 16 * 2.0**-24  # of a product of two float32 numbers, over a norm of some ten thousand


def watch():
    """A class whose hooks write down what the parameters and gradients are at each call, and what they wrote."""

    calls = []

    class Watch:
        @classmethod
        def after_backward(cls, model, step):
            cls.note("after_backward", model, step)

        @classmethod
        def transform_grads(cls, model, step):
            cls.note("transform_grads", model, step)

        @classmethod
        def after_step(cls, model, step):
            cls.note("after_step", model, step)

        @classmethod
        def note(cls, name, model, step):
            values = [p.detach().clone() for p in trained(model).values()]
            gradients = [p.grad.clone() for p in trained(model).values()]
            calls.append((name, step, values, gradients))

    return Watch, calls


class Project(Hooks):
    """Leaves no gradient to all but one parameter."""

    def transform_grads(self, step):
        assert step == 1
        assert (self.course.steps, self.course.learning_rate) == (1, 1e-3)
        for path, adapter in self.adapters.items():
            adapter.down.grad.zero_()
            if not path.endswith("o_proj"):
                adapter.up.grad.zero_()


class Projected(Pissa):
    hooks = Project


def norm(tensors):
    return torch.cat([tensor.double().flatten() for tensor in tensors]).norm().item()


def same(left, right):
    return all(map(torch.equal, left, right))


@pytest.mark.parametrize("changes", [{"batch_size": 2}, {"batch_size": 1, "accumulate": 2}], ids=str)
def test_hooks_come_once_a_step_around_the_clipping_and_the_move(language, tmp_path, changes):
    chosen = settings(steps=2, epochs=2.0, max_grad_norm=0.125, **changes)
    watching, calls = watch()
    made = trainer(language, tmp_path, sequences(), chosen, watching)
    made.train()
    names = ("after_backward", "transform_grads", "after_step")
    assert [call[:2] for call in calls] == [(name, step) for step in (1, 2) for name in names]
    for number, log in enumerate(made.state.log_history[:2]):
        (*_, start, whole), (*_, waiting, clipped), (*_, moved, kept) = calls[3 * number : 3 * number + 3]
        assert norm(whole) == pytest.approx(log["grad_norm"], rel=ROUNDOFF)
        assert norm(whole) > 0.125
        assert norm(clipped) == pytest.approx(0.125, rel=1e-5)  # torch divides by the norm + 1e-6
        assert same(start, waiting)
        assert not any(map(torch.equal, waiting, moved))
        assert same(clipped, kept)


def test_the_optimizer_takes_the_gradients_as_the_hook_of_the_method_leaves_them(language, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "pissa", Projected)
    made = trainer(language, tmp_path, sequences(), settings())
    before = {name: parameter.detach().clone() for name, parameter in trained(made.model).items()}
    made.train()
    moved = [name for name, parameter in trained(made.model).items() if not parameter.equal(before[name])]
    assert moved == ["model.layers.0.self_attn.o_proj.up"]
