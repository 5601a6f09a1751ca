"""Which process splits which weights, where several processes do a run of `qsvd quantize`."""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from qsvd.files.quantize_folder import OutputFolder
from qsvd.plan.weights import WeightSpec
from qsvd.ranks import is_main, size

Stack = tuple[int, ...]  # numbers of weights that are split together


def owners(weights: Sequence[WeightSpec], stacks: Sequence[Stack]) -> dict[Stack, int]:
    """Return the process of each stack: in their order, the one that has the fewest numbers so far.

    Neighbours then go to different processes, so that files, and blocks with --calibrate, are finished one by one.
    """
    loads, found = [0] * size(), dict[Stack, int]()
    for stack in stacks:
        found[stack] = loads.index(min(loads))
        loads[found[stack]] += sum(math.prod(weights[number].shape) for number in stack)
    return found


class Elsewhere:
    """The stacks that an earlier run or another process splits; the first process watches for them.

    Args:
        owner: The process of each stack that is not split yet.
    """

    def __init__(self, folder: OutputFolder, owner: Mapping[Stack, int]):
        self._folder, self._owner = folder, owner
        self._waits: dict[int | None, deque[Stack]] = {}  # each process splits in order

    def add(self, stack: Stack) -> None:
        """Watch for a stack."""
        if is_main():
            self._waits.setdefault(self._owner.get(stack), deque()).append(stack)

    def arrived(self) -> Iterator[Stack]:
        """Yield the stacks that are finished since the last call."""
        for waits in self._waits.values():
            while waits and all(map(self._folder.is_done, waits[0])):
                yield waits.popleft()

    @property
    def is_all(self) -> bool:
        """Whether no stack is missing."""
        return not any(self._waits.values())
