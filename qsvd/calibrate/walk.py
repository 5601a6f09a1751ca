"""Gradients of every example, and Hutchinson probes of the Hessian, from two walks through the blocks.

On the way up every block is run from its input, which stays on the host. The loss gives the gradient at the top. On the
way down each block is run again from its input, and its gradients give those of its weights and of the block below.

A probe v of random signs (Hutchinson, 1990) changes all weights at once. Its tangents go up beside the hidden states,
and the tangents of the gradient come down (Pearlmutter, 1994): what arrives at a weight is (H v) there, and the mean of
v . (H v) is the trace of that weight's part of the Hessian, since signs of different weights are independent.

Shape suffixes: T = tokens, D = hidden size.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qsvd.calibrate.streamed import Recorded, StreamedModel
from qsvd.calibrate.sums import Example, Sums
from qsvd.errors import BadInput, first_line


@dataclass(frozen=True)
class Probes:
    """How many probes each example gets; the seed decides their signs."""

    count: int
    seed: int

    def signs(self, module: str, number: int, like: Tensor) -> Tensor:
        """+1 and -1 in the shape of a weight; `number` counts probes over all examples, each with its own."""
        digest = hashlib.sha256(f"{self.seed} {number} {module}".encode()).digest()
        generator = torch.Generator(like.device).manual_seed(int.from_bytes(digest[:6]))
        bits = torch.randint(0, 2, like.shape, generator=generator, device=like.device, dtype=torch.int8)
        return (2 * bits - 1).to(like.dtype)


@dataclass
class _Track:
    """One example between two blocks; hidden states [1, T, D] on the host, each with a tangent for every probe."""

    number: int  # of the example, from 0
    example: Example
    recorded: Recorded
    inputs: list[Tensor] = field(default_factory=list)  # of every block
    tangents: list[list[Tensor]] = field(default_factory=list)
    gradient: Tensor | None = None  # at what the walk has reached
    gradient_tangents: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class _Visit:
    """A block that is in memory."""

    model: StreamedModel
    path: str
    at: int  # its place in the order of calls
    weights: Mapping[str, Tensor]
    probes: Probes

    @property
    def wanted(self) -> dict[str, Tensor]:
        """The weights that statistics are wanted of."""
        return {name: self.weights[name] for name in self.model.wanted(self.path)}

    def leaves(self) -> dict[str, Tensor]:
        """The same, to be differentiated in."""
        return {name: weight.detach().requires_grad_() for name, weight in self.wanted.items()}

    def module(self, name: str) -> str:
        """The path in the model of a weight of this block."""
        return f"{self.path}.{name.removesuffix('.weight')}"

    def run(self, track: _Track, hidden: Tensor, wanted: Mapping[str, Tensor]) -> Tensor:
        """The block for one example, with these in the place of its own weights."""
        return self.model.run_block(track.recorded.calls[self.at], {**self.weights, **wanted}, hidden)

    def signs(self, track: _Track, probe: int) -> dict[str, Tensor]:
        """One probe of an example in this block's weights."""
        number = track.number * self.probes.count + probe
        return {name: self.probes.signs(self.module(name), number, weight) for name, weight in self.wanted.items()}

    def on_device(self, tensor: Tensor) -> Tensor:
        """A tensor of the host, where the block is."""
        return tensor.to(self.model.compute.device)


def add_examples(
    model: StreamedModel, examples: Sequence[Example], sums: Sums, probes: Probes, *, first: int
) -> Iterator[None]:
    """Add some examples to the sums; every block is read twice for all of them. Yields after every visit of a block.

    Args:
        model: Read in a dtype that the gradients are computed in.
        examples: Which go together; how many there are changes no bit of the sums.
        sums: On the model's device. They are whole when the last visit is over.
        probes: Of each example; 0 is none.
        first: The number of the first example.

    Raises:
        BadInput: the model cannot be run block by block.
    """
    device = model.compute.device
    tracks = [
        _Track(first + number, example, model.record(example.inputs(device))) for number, example in enumerate(examples)
    ]
    for track in tracks:
        track.inputs.append(track.recorded.hidden)
        track.tangents.append([torch.zeros_like(track.recorded.hidden)] * probes.count)
    order = [call.path for call in tracks[0].recorded.calls]
    for at, path in enumerate(order):
        visit = _Visit(model, path, at, model.read_block(path), probes)
        for track in tracks:
            _up(visit, track)
        del visit  # before the next one is read
        yield
    for track in tracks:
        sums.add_loss(_turn(model, track))
    for at, path in reversed(list(enumerate(order))):
        visit = _Visit(model, path, at, model.read_block(path), probes)
        for track in tracks:
            _down(visit, track, sums)
        del visit
        yield


def _up(visit: _Visit, track: _Track) -> None:
    """From the input of a block to that of the next, with the tangents."""
    if not track.tangents[-1]:
        with torch.no_grad():
            track.inputs.append(visit.run(track, visit.on_device(track.inputs[-1]), {}).cpu())
        track.tangents.append([])
        return
    try:
        output, tangents = _with_tangents(visit, track)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise BadInput(
            f"{visit.path} cannot be differentiated twice ({first_line(error)}); leave --traces out"
        ) from error
    track.inputs.append(output.cpu())
    track.tangents.append(tangents)


def _with_tangents(visit: _Visit, track: _Track) -> tuple[Tensor, list[Tensor]]:
    """A block's output, and how it changes where the input and the weights change along each probe.

    What comes back of a gradient is linear in it, so that its derivative in the gradient is the change going forward:
    this asks of the block's functions no more than the way down does.
    """
    wanted = visit.leaves()
    points = (visit.on_device(track.inputs[-1]).detach().requires_grad_(), *wanted.values())
    tangents = []
    with torch.enable_grad():
        output = visit.run(track, points[0], wanted)
        above = torch.zeros_like(output, requires_grad=True)
        back = torch.autograd.grad(output, points, above, create_graph=True, allow_unused=True)
        for probe, tangent in enumerate(track.tangents[-1]):
            changes = (visit.on_device(tangent), *visit.signs(track, probe).values())
            (moved,) = torch.autograd.grad(_along(back, changes), above, retain_graph=True)
            tangents.append(moved.cpu())
    return output.detach(), tangents


def _turn(model: StreamedModel, track: _Track) -> float:
    """The loss, and its gradient at the last block's output, with the tangents of the gradient."""
    device = model.compute.device
    hidden = track.inputs.pop().to(device).requires_grad_()
    tangents = track.tangents.pop()
    logits, others = model.logits(track.example.inputs(device), hidden)
    loss = track.example.loss(logits)
    if not torch.isfinite(loss):
        raise BadInput(
            f"the loss of an example is {float(loss.detach())}: the checkpoint holds numbers that are none, or they "
            f"overflow in {model.compute.dtype}; repair it, or give --dtype float32"
        )
    gradient, *strays = torch.autograd.grad(loss, (hidden, *others), create_graph=bool(tangents), allow_unused=True)
    if any(stray is not None for stray in strays):
        raise BadInput("the model's output uses more than the last block's; it cannot be run block by block")
    track.gradient = gradient.detach().cpu()
    for tangent in tangents:
        (moved,) = torch.autograd.grad(gradient, hidden, tangent.to(device), retain_graph=True)
        track.gradient_tangents.append(moved.cpu())
    return float(loss.detach())


def _down(visit: _Visit, track: _Track, sums: Sums) -> None:
    """From the gradient at a block's output to that at its input; the weights' gradients go into the sums."""
    assert track.gradient is not None, "the walk has turned"
    wanted, tangents = visit.leaves(), track.tangents.pop()
    points = (visit.on_device(track.inputs.pop()).requires_grad_(), *wanted.values())
    with torch.enable_grad():
        output = visit.run(track, points[0], wanted)
        above = visit.on_device(track.gradient)
        back = torch.autograd.grad(output, points, above, create_graph=bool(tangents), allow_unused=True)
        for name, gradient in zip(wanted, back[1:], strict=True):
            if gradient is not None:  # None is an expert that no token went to
                sums.add_gradient(visit.module(name), gradient.detach())
        for probe, tangent in enumerate(tangents):
            signs = visit.signs(track, probe)
            moved = _dot(output, visit.on_device(track.gradient_tangents[probe]))
            moved = moved + _along(back, (visit.on_device(tangent), *signs.values()))
            second = torch.autograd.grad(moved, points, retain_graph=True, allow_unused=True)
            for name, part in zip(wanted, second[1:], strict=True):
                if part is not None:
                    sums.add_trace(visit.module(name), float(_dot(signs[name], part)))
            track.gradient_tangents[probe] = second[0].cpu()
    track.gradient = back[0].detach().cpu()


def _along(gradients: Sequence[Tensor | None], changes: Sequence[Tensor]) -> Tensor:
    """The sum of all products of gradients and changes."""
    pairs = zip(gradients, changes, strict=True)
    return torch.stack([_dot(gradient, change) for gradient, change in pairs if gradient is not None]).sum()


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """The sum of products, at least float32."""
    exact = torch.promote_types(left.dtype, torch.float32)
    return (left.to(exact) * right.to(exact)).sum()
