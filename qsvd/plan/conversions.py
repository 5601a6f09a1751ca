"""Parameters that transformers computes from other tensors when it loads a model, such as stacks from single experts.

Which rows of which tensors a parameter is made of is found by the conversion itself: it is run on the numbers of the
rows instead of the rows.
"""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qsvd.plan.weights import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_ROWS, MOST_MATRICES = 2**24, 2**12  # of one tensor of a checkpoint


@dataclass(frozen=True)
class Conversion:
    """One conversion of transformers.

    Args:
        converter: A transformers.core_model_loading.WeightConverter.
        key: The first parameter that it makes, as transformers names it while it loads.
        sources: Its tensors in the checkpoint, in order, by the pattern of the converter that they match.
    """

    converter: Any
    key: str
    sources: Mapping[str, Sequence[str]]

    def run(self, read: Callable[[str], Tensor], model: "PreTrainedModel") -> dict[str, Tensor]:
        """Return the parameters by name, made of what `read` returns for the names of the tensors.

        Raises:
            ValueError, RuntimeError, KeyError, IndexError: tensors are missing or have wrong shapes.
        """
        converter = copy.copy(self.converter)
        converter.collected_tensors = {
            pattern: [partial(read, name) for name in names] for pattern, names in self.sources.items()
        }
        made = converter.convert(self.key, model=model, config=model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


def rows_of(
    conversion: Conversion, shapes: Mapping[str, tuple[int, ...]], model: "PreTrainedModel"
) -> dict[str, list[tuple[Source, ...]]]:
    """Return what each matrix of the parameters is made of; a parameter is left out if it has other parts than rows.

    Args:
        shapes: Of all tensors of the checkpoint.
    """
    names = [name for named in conversion.sources.values() for name in named]
    numbers = {name: number for number, name in enumerate(names)}

    def read(name: str) -> Tensor:
        return _row_numbers(numbers[name], shapes[name])

    try:
        made = conversion.run(read, model)
    except (ValueError, RuntimeError, KeyError, IndexError):
        return {}
    found = {}
    for name, ids in made.items():
        matrices = ids if ids.ndim == 3 else ids[None]
        parts = [_parts(matrix, names, shapes) for matrix in matrices]
        if ids.ndim in (2, 3) and all(parts):
            found[name] = [part for part in parts if part is not None]
    return found


def _row_numbers(number: int, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor with one column, which holds the number of the tensor, of the matrix and of the row."""
    *matrices, rows, _ = shape
    count = matrices[0] if matrices else 1
    ids = torch.arange(count)[:, None] * MOST_ROWS + torch.arange(rows)
    ids = (ids + number * MOST_MATRICES * MOST_ROWS)[..., None]
    return ids if matrices else ids[0]


def _parts(ids: Tensor, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> tuple[Source, ...] | None:
    """Return the rows that a matrix consists of; None if they are not in their order."""
    is_transposed = ids.shape[0] == 1 < ids.shape[1]
    if 1 not in ids.shape:
        return None
    flat = ids.flatten()
    breaks = ((flat[1:] - flat[:-1]) != 1).nonzero().flatten() + 1
    edges = [0, *breaks.tolist(), len(flat)]
    parts = []
    for start, stop in itertools.pairwise(edges):
        place, row = divmod(int(flat[start]), MOST_ROWS)
        number, matrix = divmod(place, MOST_MATRICES)
        shape = shapes[names[number]]
        rows = None if stop - start == shape[-2] else (row, row + stop - start)
        parts.append(Source(names[number], matrix if len(shape) == 3 else None, rows, is_transposed))
    if len(parts) > MOST_PARTS or (is_transposed and len(parts) > 1):
        return None
    return tuple(parts)


MOST_PARTS = 8  # of one matrix; more are rows that change places
