"""Walks over the blocks of a model that give the second moments of one block after another, while it is split.

InputWalk goes from the first block to the last. Each block runs on the outputs of the split blocks before it, gives the
moments of its inputs, and is run again when it is split (GPTQ, arXiv:2210.17323, does the same).

GradientWalk runs the 16-bit model forward, draws a label for every token from what the model predicts (the true Fisher
information; Martens and Grosse, arXiv:1503.05671), and goes from the last block to the first. Each block runs forward
and backward again, so that the moments of inputs and gradients are known at the same time. Until then its inputs are in
a file.

One block is in memory, with its statistics and inputs. A run that is stopped walks again over the blocks that are
split, without statistics, so that nothing but the splits is kept.

Shape suffixes: T = tokens, D = hidden size, V = vocabulary.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from qsvd.calibrate.moments import BlockMoments
from qsvd.calibrate.stand_in import Call
from qsvd.calibrate.streamed import StreamedModel
from qsvd.calibrate.sums import Example
from qsvd.decompose.moments import Moments
from qsvd.decompose.objective import PLAIN, Objective
from qsvd.errors import BadInput
from qsvd.files.quantized.stack import TensorStack
from qsvd.memory.items import block_of
from qsvd.plan.weights import WeightSpec


@dataclass
class _Track:
    """The state of one example between two blocks: tensors [1, T, D] in CPU memory."""

    example: Example
    calls: Sequence[Call]
    hidden: Tensor  # the input of the block that is next; in a GradientWalk, the gradient at its output


class BlockWalk(ABC):
    """A walk over the blocks. `objective` goes on to the block of a weight; `take` says what became of a weight.

    Args:
        model: It runs in its dtype.
        show: Is called with words before a block is run.
    """

    is_backward: ClassVar[bool]

    def __init__(self, model: StreamedModel, examples: Sequence[Example], show: Callable[[str], None]):
        self.model, self._show = model, show
        self._tracks = []
        for example in examples:
            hidden, calls = model.record(example.inputs(model.device))
            if not self._tracks:
                model.check_called_once(example.inputs(model.device), hidden.to(model.device))
            self._tracks.append(_Track(example, calls, hidden))
        forward = [call.path for call in self._tracks[0].calls]
        self.order = forward[::-1] if self.is_backward else forward
        self._at, self._moments = 0, None  # the place in the order of the block that is next; its moments
        self._numbers = {path: number for number, path in enumerate(forward)}

    def place(self, spec: WeightSpec) -> int:
        """Return the place of the block of a weight in the walk; -1 for a weight outside of the blocks."""
        path = block_of(spec.module)
        return self.order.index(path) if path in self._numbers else -1

    def objective(self, spec: WeightSpec) -> Moments | Objective:
        """Return what the split of a weight minimizes; blocks before its block are passed.

        Raises:
            BadInput: numbers of the model overflow.
        """
        place = self.place(spec)
        if place < 0:
            return PLAIN
        assert place >= self._at, "weights come in the order of the walk"
        while self._at < place:
            self._pass()
            self._moments, self._at = None, self._at + 1
        if self._moments is None:
            self._collect(with_moments=True)
        assert self._moments is not None, "collected before"
        return self._moments.objective(spec)

    def take(self, spec: WeightSpec, dense_OI: Callable[[], Tensor]) -> None:
        """Take a split weight, float32 [O, I] on any device, of the block that is next or of a later one."""
        del spec, dense_OI

    def _collect(self, *, with_moments: bool) -> None:
        """Run the block that is next, and keep its moments."""
        path = self.order[self._at]
        self._show(f"block {self._at + 1}/{len(self.order)} of the calibration")
        wanted = self.model.weights(path) if with_moments else ()
        moments = BlockMoments(self.model.block(path), path, wanted)
        weights = self.model.read_block(path)
        for index in range(len(self._tracks)):
            with moments.watching():
                self._run(index, path, weights)
        moments.pool()
        self._moments = moments

    @abstractmethod
    def _run(self, index: int, path: str, weights: Mapping[str, Tensor]) -> None:
        """Run the block that is next for one example, while its layers are watched."""

    @abstractmethod
    def _pass(self) -> None:
        """Leave the block that is next, whose weights are split."""

    def _call(self, track: _Track, path: str) -> Call:
        return track.calls[self._numbers[path]]

    def _output(self, track: _Track, path: str, weights: Mapping[str, Tensor], state: Tensor) -> Tensor:
        """Return the output of a block for one example, in CPU memory."""
        with torch.no_grad():
            return self.model.run_block(self._call(track, path), weights, state.to(self.model.device)).cpu()


class InputWalk(BlockWalk):
    """From the first block to the last, on the outputs of split blocks."""

    is_backward = False

    def __init__(self, model: StreamedModel, examples: Sequence[Example], show: Callable[[str], None]):
        super().__init__(model, examples, show)
        self._taken: dict[str, tuple[WeightSpec, Callable[[], Tensor]]] = {}

    def take(self, spec: WeightSpec, dense_OI: Callable[[], Tensor]) -> None:
        self._taken[spec.module] = (spec, dense_OI)

    def _run(self, index: int, path: str, weights: Mapping[str, Tensor]) -> None:
        self._output(self._tracks[index], path, weights, self._tracks[index].hidden)

    def _pass(self) -> None:
        path = self.order[self._at]
        weights = self.model.read_block(path)
        for spec in self.model.weights(path):
            if spec.module not in self._taken:  # measured, not split
                continue
            spec, dense_OI = self._taken.pop(spec.module)
            is_transposed = any(source.is_transposed for source in spec.sources) and not spec.stack
            split = dense_OI().to(self.model.device, self.model.dtype)
            weights[f"{spec.module.removeprefix(f'{path}.')}.weight"] = split.mT if is_transposed else split
        for track in self._tracks:
            track.hidden = self._output(track, path, weights, track.hidden)


class GradientWalk(BlockWalk):
    """From the last block to the first, with the gradient of the loss for labels drawn from the model.

    Args:
        seed: Of the labels.
        inputs: Keeps the inputs of the blocks. If those of all blocks need more bytes than it may use, those of every
            k-th block are kept, with k near the square root of their number, and the blocks after it run again.

    Raises:
        BadInput: the loss of an example is NaN or infinite.
    """

    is_backward = True

    def __init__(
        self,
        model: StreamedModel,
        examples: Sequence[Example],
        show: Callable[[str], None],
        *,
        seed: int,
        inputs: TensorStack,
    ):
        super().__init__(model, examples, show)
        count, states = len(self.order), [track.hidden for track in self._tracks]
        size = sum(state.nbytes for state in states)
        step = 1 if count * size <= inputs.most_bytes else math.ceil(math.sqrt(count))
        inputs.check_room(min(count, 2 * step) * size)
        self._inputs, self._kept = inputs, list[int]()  # for each example; the numbers of the blocks
        self._states = list[Tensor]()  # the inputs of the block that is next, while it runs
        states = self._forward(states, 0, count, step)
        for number, (track, state) in enumerate(zip(self._tracks, states, strict=True)):
            track.hidden = _gradient(model, track.example, state, seed + number)

    def _forward(self, states: list[Tensor], first: int, last: int, step: int) -> list[Tensor]:
        """Run blocks on these inputs of the first; keep the inputs of every `step`-th, and return the last outputs."""
        for number in range(first, last):
            if (number - first) % step == 0:
                self._inputs.push(states)
                self._kept.append(number)
            path = self.order[-1 - number]  # the order is that of the walk
            self._show(f"block {number + 1}/{len(self.order)} runs forward")
            weights = self.model.read_block(path)
            pairs = zip(self._tracks, states, strict=True)
            states = [self._output(track, path, weights, state) for track, state in pairs]
        return states

    @property
    def _number(self) -> int:
        """The number of the block that is next, in the order of the model."""
        return len(self.order) - 1 - self._at

    def _collect(self, *, with_moments: bool) -> None:
        number = self._number
        first = self._kept.pop()
        self._states = self._forward(self._inputs.pop(), first, number, 1)
        super()._collect(with_moments=with_moments)
        self._states = []

    def _run(self, index: int, path: str, weights: Mapping[str, Tensor]) -> None:
        track = self._tracks[index]
        with torch.enable_grad():
            hidden = self._states[index].to(self.model.device).requires_grad_()
            output = self.model.run_block(self._call(track, path), weights, hidden)
            (gradient,) = torch.autograd.grad(output, hidden, track.hidden.to(self.model.device))
        track.hidden = gradient.cpu()

    def _pass(self) -> None:
        if self._moments is None:  # the gradient has to go on
            self._collect(with_moments=False)


def _gradient(model: StreamedModel, example: Example, state: Tensor, seed: int) -> Tensor:
    """Return the gradient, at the output of the last block, of the summed loss for labels drawn from the model."""
    hidden = state.to(model.device).requires_grad_()
    inputs = example.inputs(model.device)
    logits, others = model.logits(inputs, hidden)
    logits_TV = logits.reshape(-1, logits.shape[-1]).to(torch.promote_types(logits.dtype, torch.float32))
    if not logits_TV.isfinite().all():
        raise BadInput(f"{model.checkpoint.name}: an example has logits that are NaN or infinite; check the model")
    generator = torch.Generator(model.device).manual_seed(seed)
    labels_T = torch.multinomial(logits_TV.detach().softmax(dim=-1), 1, generator=generator)[:, 0]
    loss = functional.cross_entropy(logits_TV, labels_T, reduction="sum")
    gradient, *strays = torch.autograd.grad(loss, (hidden, *others), allow_unused=True)
    if any(stray is not None for stray in strays):
        raise BadInput("the model's output uses outputs of other blocks than the last; give --sensitivity inputs")
    return gradient.cpu()
