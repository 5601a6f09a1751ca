"""Tokens in an Arrow file that is mapped into memory: pages of it are read when needed, and dropped by the system."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

if TYPE_CHECKING:
    from datasets import Dataset


class MappedTokens(Sequence[list[int]]):
    """A column of an Arrow file, a list of whole numbers in each row; some of its rows in an order.

    Args:
        path: Arrow stream with the columns input_ids and labels.
        name: Of the column.
        chosen: The rows; None is all.
    """

    def __init__(self, path: Path, name: str, chosen: numpy.ndarray | None = None, column: Any = None):
        self.path, self.name, self.chosen = path, name, chosen
        self._column = mapped_table(path)[name] if column is None else column

    def __len__(self) -> int:
        return len(self._column) if self.chosen is None else len(self.chosen)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._array(number).tolist() for number in range(*index.indices(len(self)))]
        return self._array(range(len(self))[index]).tolist()

    def __iter__(self) -> Iterator[list[int]]:
        return (array.tolist() for array in self.arrays())

    def arrays(self) -> Iterator[numpy.ndarray]:
        """Yield every row as an array."""
        return (self._array(index) for index in range(len(self)))

    def take(self, indexes: Sequence[int]) -> "MappedTokens":
        """Return some rows, in the order given."""
        chosen = numpy.asarray(indexes, dtype=numpy.int64)
        return MappedTokens(self.path, self.name, chosen if self.chosen is None else self.chosen[chosen], self._column)

    def as_dataset(self, names: Sequence[str]) -> "Dataset":
        """Return a data set of these rows, with some columns of the file."""
        from datasets import Dataset

        data = Dataset.from_file(str(self.path)).select_columns(list(names))
        return data if self.chosen is None else data.select(self.chosen)

    def _array(self, index: int) -> numpy.ndarray:
        row = index if self.chosen is None else int(self.chosen[index])
        return self._column[row].values.to_numpy()


def mapped_table(path: Path) -> Any:
    """Return the table of an Arrow stream, mapped."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        return pyarrow.ipc.open_stream(source).read_all()
