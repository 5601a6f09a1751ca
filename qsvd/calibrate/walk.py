"""Gradients of every example, and Hutchinson probes of the Hessian, in two passes over the blocks.

The forward pass runs every block and keeps its input in CPU memory. The loss gives the gradient at the last block. The
backward pass runs each block again from its input, and computes the gradients of its weights and of its input.

A probe v of random signs (Hutchinson, 1990) perturbs all weights at once. Its tangents are computed in the forward pass
together with the hidden states, and the tangents of the gradient in the backward pass (Pearlmutter, 1994): at a weight
they are (H v). The mean of v . (H v) over one weight is the trace of its block of the Hessian, because the signs of
different weights are independent.

Shape suffixes: T = tokens, D = hidden size.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qsvd.calibrate.stand_in import Call
from qsvd.calibrate.streamed import StreamedModel
from qsvd.calibrate.sums import Example, Sums
from qsvd.errors import BadInput, first_line


@dataclass(frozen=True)
class Probes:
    """Number of probes of each example, and the seed of their signs."""

    count: int
    seed: int

    def signs(self, module: str, number: int, like: Tensor) -> Tensor:
        """Return +1 and -1 in the shape of a weight; `number` is different for each probe of each example."""
        digest = hashlib.sha256(f"{self.seed} {number} {module}".encode()).digest()
        generator = torch.Generator(like.device).manual_seed(int.from_bytes(digest[:6]))
        bits = torch.randint(0, 2, like.shape, generator=generator, device=like.device, dtype=torch.int8)
        return (2 * bits - 1).to(like.dtype)


AT = "at "  # begins the names of what a stopped backward pass needs
AT_BLOCKS = f"{AT}blocks"


@dataclass
class _Track:
    """The state of one example between two blocks: tensors [1, T, D] in CPU memory, tangents for every probe."""

    number: int  # index of the example
    example: Example
    calls: Sequence[Call]
    inputs: list[Tensor]  # of every block so far
    tangents: list[list[Tensor]]
    gradient: Tensor | None = None  # of the loss, at the block that the backward pass has reached
    gradient_tangents: list[Tensor] = field(default_factory=list)

    def at(self) -> dict[str, Tensor]:
        """Return where the backward pass is."""
        assert self.gradient is not None, "_loss() was called before"
        tangents = {f"{AT}tangent {self.number} {n}": tangent for n, tangent in enumerate(self.gradient_tangents)}
        return {f"{AT}gradient {self.number}": self.gradient} | tangents

    def go_to(self, at: Mapping[str, Tensor], probes: int) -> None:
        """Be where an earlier backward pass was."""
        self.gradient = at[f"{AT}gradient {self.number}"]
        self.gradient_tangents = [at[f"{AT}tangent {self.number} {probe}"] for probe in range(probes)]


@dataclass(frozen=True)
class _LoadedBlock:
    """A block whose tensors are in memory."""

    model: StreamedModel
    path: str
    at: int  # its index in the order of calls
    weights: Mapping[str, Tensor]
    probes: Probes

    @property
    def wanted(self) -> dict[str, Tensor]:
        """The weights that need statistics."""
        return {name: self.weights[name] for name in self.model.wanted(self.path)}

    def leaves(self) -> dict[str, Tensor]:
        """Return the same weights as leaf tensors that require gradients."""
        return {name: weight.detach().requires_grad_() for name, weight in self.wanted.items()}

    def module(self, name: str) -> str:
        """Return the path in the model of a weight of this block."""
        return f"{self.path}.{name.removesuffix('.weight')}"

    def run(self, track: _Track, hidden: Tensor, wanted: Mapping[str, Tensor]) -> Tensor:
        """Return the output of the block for one example, with `wanted` instead of its own weights."""
        return self.model.run_block(track.calls[self.at], {**self.weights, **wanted}, hidden)

    def signs(self, track: _Track, probe: int) -> dict[str, Tensor]:
        """Return the signs of one probe of an example for the weights of this block."""
        number = track.number * self.probes.count + probe
        return {name: self.probes.signs(self.module(name), number, weight) for name, weight in self.wanted.items()}


def add_examples(  # each is a choice of its own
    model: StreamedModel,
    examples: Sequence[Example],
    sums: Sums,
    probes: Probes,
    *,
    first: int,
    at: Mapping[str, Tensor] | None = None,
) -> Iterator[Mapping[str, Tensor]]:
    """Add some examples to the sums, and yield after every block; every block is read twice for all examples together.

    In the backward pass it yields where it is; another call with the same examples and the same sums goes on there.

    Args:
        model: Gradients are computed in its dtype.
        examples: Examples of one pass. How many there are does not change the sums.
        sums: On the model's device. They are complete after the last block.
        probes: Probes of each example; a count of 0 computes no traces.
        first: Index of the first example.
        at: Where an earlier backward pass was; None or empty starts anew.

    Raises:
        BadInput: the model cannot be run block by block.
    """
    tracks = []
    for number, example in enumerate(examples, start=first):
        hidden, calls = model.record(example.inputs(model.device))
        tracks.append(_Track(number, example, calls, [hidden], [[torch.zeros_like(hidden)] * probes.count]))
    order = [call.path for call in tracks[0].calls]
    done = int(at[AT_BLOCKS]) if at else 0  # blocks of the backward pass; of the last one left, the input is needed
    for number, path in enumerate(order[: max(len(order) - done - 1, 0)] if done else order):
        block = _LoadedBlock(model, path, number, model.read_block(path), probes)
        for track in tracks:
            _forward(block, track)
        del block  # frees its memory before the next block is read
        yield {}
    for track in tracks:
        if at:
            track.go_to(at, probes.count)
        else:
            sums.add_loss(_loss(model, track))
    for number in reversed(range(len(order) - done)):
        path = order[number]
        block = _LoadedBlock(model, path, number, model.read_block(path), probes)
        for track in tracks:
            _backward(block, track, sums)
        sums.end_block(model.weights(path))
        del block
        reached = {AT_BLOCKS: torch.tensor([len(order) - number])}
        yield reached | {name: tensor for track in tracks for name, tensor in track.at().items()}
    _towers(model, tracks, sums)


def _forward(block: _LoadedBlock, track: _Track) -> None:
    """Compute the input of the next block, with its tangents."""
    if not track.tangents[-1]:
        with torch.no_grad():
            track.inputs.append(block.run(track, track.inputs[-1].to(block.model.device), {}).cpu())
        track.tangents.append([])
        return
    try:
        output, tangents = _with_tangents(block, track)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise BadInput(
            f"{block.path} cannot be differentiated twice ({first_line(error)}); leave --traces out"
        ) from error
    track.inputs.append(output.cpu())
    track.tangents.append(tangents)


def _with_tangents(block: _LoadedBlock, track: _Track) -> tuple[Tensor, list[Tensor]]:
    """Return a block's output, and its derivative along each probe (a change of the input and of the weights).

    The backward pass of a block is linear in the gradient that enters it. Differentiating it with respect to that
    gradient gives the forward derivative, so the block needs no forward-mode differentiation.
    """
    wanted = block.leaves()
    points = (track.inputs[-1].to(block.model.device).detach().requires_grad_(), *wanted.values())
    tangents = []
    with torch.enable_grad():
        output = block.run(track, points[0], wanted)
        above = torch.zeros_like(output, requires_grad=True)
        back = torch.autograd.grad(output, points, above, create_graph=True, allow_unused=True)
        for probe, tangent in enumerate(track.tangents[-1]):
            changes = (tangent.to(block.model.device), *block.signs(track, probe).values())
            (moved,) = torch.autograd.grad(_along(back, changes), above, retain_graph=True)
            tangents.append(moved.cpu())
    return output.detach(), tangents


def _loss(model: StreamedModel, track: _Track) -> float:
    """Return the loss; keep its gradient at the output of the last block, with the tangents of the gradient."""
    hidden = track.inputs.pop().to(model.device).requires_grad_()
    tangents = track.tangents.pop()
    logits, others = model.logits(track.example.inputs(model.device), hidden)
    loss = track.example.loss(logits)
    if not torch.isfinite(loss):
        raise BadInput(
            f"{model.checkpoint.name}: the loss of an example is {float(loss.detach())}: numbers overflow in "
            f"{model.dtype}; give --dtype float32, or check the model"
        )
    gradient, *strays = torch.autograd.grad(loss, (hidden, *others), create_graph=bool(tangents), allow_unused=True)
    if any(stray is not None for stray in strays):
        raise BadInput("the model's output uses outputs of other blocks than the last; it cannot be run block by block")
    track.gradient = gradient.detach().cpu()
    for tangent in tangents:
        (moved,) = torch.autograd.grad(gradient, hidden, tangent.to(model.device), retain_graph=True)
        track.gradient_tangents.append(moved.cpu())
    return float(loss.detach())


def _backward(block: _LoadedBlock, track: _Track, sums: Sums) -> None:
    """Compute the gradient at a block's input from that at its output, and add those of its weights to the sums."""
    assert track.gradient is not None, "_loss() was called before"
    wanted, tangents = block.leaves(), track.tangents.pop()
    points = (track.inputs.pop().to(block.model.device).requires_grad_(), *wanted.values())
    with torch.enable_grad():
        output = block.run(track, points[0], wanted)
        above = track.gradient.to(block.model.device)
        back = torch.autograd.grad(output, points, above, create_graph=bool(tangents), allow_unused=True)
        for name, gradient in zip(wanted, back[1:], strict=True):
            if gradient is not None:  # None for an expert that got no token
                sums.add_gradient(block.module(name), gradient.detach())
        for probe, tangent in enumerate(tangents):
            signs = block.signs(track, probe)
            moved = _dot(output, track.gradient_tangents[probe].to(block.model.device))
            moved = moved + _along(back, (tangent.to(block.model.device), *signs.values()))
            second = torch.autograd.grad(moved, points, retain_graph=True, allow_unused=True)
            for name, part in zip(wanted, second[1:], strict=True):
                if part is not None:
                    sums.add_trace(block.module(name), float(_dot(signs[name], part)))
            track.gradient_tangents[probe] = second[0].cpu()
    track.gradient = back[0].detach().cpu()


def _towers(model: StreamedModel, tracks: Sequence[_Track], sums: Sums) -> None:
    """Add the gradients of the weights of encoders of images, which are in memory as a whole."""
    weights = {name: weight.detach().requires_grad_() for name, weight in model.tower_weights.items()}
    for track in tracks if weights else ():
        assert track.gradient is not None, "_backward() was called for the first block"
        hidden = model.before_blocks(track.example.inputs(model.device), weights)
        if hidden.requires_grad:  # else the example has no image
            above = track.gradient.to(model.device)
            found = torch.autograd.grad(hidden, list(weights.values()), above, allow_unused=True)
            for name, gradient in zip(weights, found, strict=True):
                if gradient is not None:  # None for layers after the one whose output is taken
                    sums.add_gradient(name.removesuffix(".weight"), gradient)


def _along(gradients: Sequence[Tensor | None], changes: Sequence[Tensor]) -> Tensor:
    """Return the sum of all products of gradients and changes."""
    pairs = zip(gradients, changes, strict=True)
    return torch.stack([_dot(gradient, change) for gradient, change in pairs if gradient is not None]).sum()


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Return the sum of products, in float32 or better."""
    exact = torch.promote_types(left.dtype, torch.float32)
    return (left.to(exact) * right.to(exact)).sum()
