"""Weights of a checkpoint one after another, the next one being read while this one is worked on."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from qsvd.checkpoint.read import Checkpoint


def stream(checkpoint: Checkpoint, names: Sequence[str]) -> Iterator[Tensor]:
    """The tensors of these names, in order; at most two are in memory, the one yielded and the one after it."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        coming = [reader.submit(checkpoint.read, name) for name in names[:1]]
        for number in range(len(names)):
            tensor = coming.pop().result()
            coming += [reader.submit(checkpoint.read, name) for name in names[number + 1 : number + 2]]
            yield tensor
            del tensor
