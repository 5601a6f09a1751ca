"""The safetensors format, read and written tensor by tensor (https://github.com/huggingface/safetensors, "Format").

The safetensors library maps a file into memory to read it and needs all tensors in memory to write it. Here every
tensor is read into its own buffer and written alone, so that the resident memory is known.

    8 bytes   length N of the header, little endian
    N bytes   JSON: name -> {"dtype", "shape", "data_offsets": [begin, end]}, and "__metadata__" -> {str: str}
    the rest  the tensors' bytes, row-major, little endian, without holes
"""

import json
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from io import RawIOBase
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy
import torch

from qsvd.errors import BadInput, listing
from qsvd.files.atomic import whole_file

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
READERS = 4  # threads; a disk is fastest with several requests at a time
AHEAD = 2**29  # bytes of tensors that are read and not yet used
CHUNK_BYTES = 8 * 2**20  # copied at a time from file to file
ALIGNMENT = 8  # the data start at a multiple of this, so that every tensor is aligned to its dtype
METADATA = "__metadata__"


@dataclass(frozen=True)
class Entry:
    """A tensor that is not read yet."""

    name: str
    dtype: str  # in the spelling of safetensors, "BF16"
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def stored_bytes(self) -> int:
        """Bytes in the file; fewer than `num_bytes` if the tensor is decoded while it is read."""
        return self.num_bytes


@dataclass(frozen=True)
class TensorEntry(Entry):
    """A tensor in a safetensors file."""

    file: Path
    start: int  # offset of the first byte in the file

    def rows(self, first: int, end: int) -> "TensorEntry":
        """Return the entry of the rows `first` to `end` - 1; they lie in one piece.

        Raises:
            BadInput: the tensor has fewer rows.
        """
        if not 0 <= first < end <= self.shape[0]:
            raise BadInput(f"{self.file}: {self.name} {list(self.shape)} has no rows {first} to {end - 1}")
        size = self.num_bytes // self.shape[0]
        shape = (end - first, *self.shape[1:])
        return replace(self, shape=shape, start=self.start + first * size, num_bytes=(end - first) * size)

    def part(self, index: int | None = None, rows: tuple[int, int] | None = None) -> "TensorEntry":
        """Return the entry of one matrix of a stack, and of rows of it."""
        entry = self
        if index is not None:
            entry = replace(self.rows(index, index + 1), shape=self.shape[1:])
        return entry if rows is None else entry.rows(*rows)


@dataclass(frozen=True)
class SafetensorsHeader:
    """The header of a safetensors file."""

    tensors: dict[str, TensorEntry]  # in the order of their bytes
    metadata: dict[str, str]
    raw: bytes = field(repr=False)  # the JSON text in the file


class NewTensor(NamedTuple):
    """A tensor to write: its values, a function that makes them when they are written, or its place in another file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: torch.Tensor | TensorEntry | Callable[[], torch.Tensor]


def new_tensor(name: str, source: torch.Tensor | TensorEntry) -> NewTensor:
    """Return a tensor to write as it is, from memory or from another file."""
    dtype = source.dtype if isinstance(source, TensorEntry) else DTYPE_NAMES[source.dtype]
    return NewTensor(name, dtype, tuple(source.shape), source)


def new_tensors(sources: Mapping[str, torch.Tensor | TensorEntry]) -> list[NewTensor]:
    """Return tensors to write as they are, by name."""
    return [new_tensor(name, source) for name, source in sources.items()]


def read_header(path: Path) -> SafetensorsHeader:
    """Read the header of a safetensors file.

    Raises:
        BadInput: the file breaks the format, is truncated or is too long; the sentence names it and the fault.
    """
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if file_bytes < 8 or length > file_bytes - 8:
            asked = f"its header should have {length} bytes" if file_bytes >= 8 else "a header starts with 8 bytes"
            raise BadInput(f"{path} is truncated or not a safetensors file: {asked}, the file has {file_bytes}")
        raw = file.read(length)
    table = _parse(path, raw)
    metadata = table.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise BadInput(f"{path} is not a safetensors file: {METADATA} must map strings to strings")
    entries = [_entry(path, name, fields, 8 + length) for name, fields in table.items()]
    entries.sort(key=lambda entry: (entry.start, entry.num_bytes))
    _check_extent(path, entries, 8 + length, file_bytes)
    return SafetensorsHeader({entry.name: entry for entry in entries}, metadata, raw)


def read_tensor(entry: TensorEntry, *, pinned: bool = False) -> torch.Tensor:
    """Read a tensor into its own memory, pinned for a GPU or not; raise BadInput if the file ends too early."""
    flat = torch.empty(entry.num_bytes, dtype=torch.uint8, pin_memory=pinned and entry.num_bytes > 0)
    view = flat.numpy().data
    done = 0
    with entry.file.open("rb", buffering=0) as file:
        file.seek(entry.start)
        while done < entry.num_bytes:  # one call reads 2 GiB at most
            done += _read_some(file, view[done:], entry)
    return flat.view(TORCH_DTYPES[entry.dtype]).reshape(entry.shape)


class ReadAhead:
    """Tensors that threads read before they are asked for, in the order of `entries`, at most `AHEAD` bytes of them.

    A call returns a tensor once. One that is not read yet, or not among the entries, is read by the caller.

    Args:
        pinned: Whether a GPU gets the tensors: it copies pinned memory at the speed of its link.
    """

    def __init__(self, entries: Iterable[TensorEntry], *, pinned: bool = False):
        self._left = deque(entries)
        self._pinned, self._bytes = pinned, 0
        self._found: dict[TensorEntry, Future[torch.Tensor]] = {}
        self._threads = ThreadPoolExecutor(READERS, "read ahead")
        self._submit()

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._found.clear()
        if self._pinned:
            torch.accelerator.memory.empty_host_cache()

    def __call__(self, entry: TensorEntry) -> torch.Tensor:
        """Return the tensor of an entry."""
        future = self._found.pop(entry, None)
        if future is None:
            return read_tensor(entry, pinned=self._pinned)
        self._bytes -= entry.num_bytes
        self._submit()
        return future.result()

    def _submit(self) -> None:
        while self._left and (not self._found or self._bytes + self._left[0].num_bytes <= AHEAD):
            entry = self._left.popleft()
            self._bytes += entry.num_bytes
            self._found[entry] = self._threads.submit(read_tensor, entry, pinned=self._pinned)


def map_tensor(entry: TensorEntry) -> torch.Tensor:
    """Map a tensor: only the parts that are used are read, and changes do not reach the file."""
    if not entry.num_bytes:
        return read_tensor(entry)
    place = numpy.memmap(entry.file, dtype=numpy.uint8, mode="c", offset=entry.start, shape=(entry.num_bytes,))
    return torch.from_numpy(place).view(TORCH_DTYPES[entry.dtype]).reshape(entry.shape)


def write_stream(path: Path, tensors: Iterable[NewTensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file that is complete or does not exist (see `whole_file`).

    The bytes depend on names, values and metadata, not on the order of `tensors`.

    Args:
        metadata: Strings by name; transformers expects {"format": "pt"}.

    Raises:
        BadInput: a name is given twice or is reserved; a source has another dtype or shape than stated, or is
            truncated.
    """
    ordered = sorted(tensors, key=lambda new: (-TORCH_DTYPES[new.dtype].itemsize, new.name))
    _check_new(path, ordered)
    with whole_file(path) as file:
        file.write(_header(ordered, metadata))
        for new in ordered:
            if isinstance(new.source, TensorEntry):
                _copy(new.source, file)
                continue
            values = new.source if isinstance(new.source, torch.Tensor) else new.source()
            _check_source(path, new, values)
            file.write(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            del values  # before the next ones are made


def _parse(path: Path, raw: bytes) -> dict:
    def no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
        table = dict(pairs)
        if len(table) < len(pairs):
            raise BadInput("a name comes twice")
        return table

    try:
        table = json.loads(raw, object_pairs_hook=no_duplicates)
    except ValueError as error:
        raise BadInput(f"{path} is not a safetensors file: its header is not valid JSON ({error})") from error
    if not isinstance(table, dict):
        raise BadInput(f"{path} is not a safetensors file: its header is a JSON {type(table).__name__}, not an object")
    return table


def _entry(path: Path, name: str, fields: object, data_start: int) -> TensorEntry:
    match fields:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if all(
            isinstance(size, int) and size >= 0 for size in shape
        ):
            pass
        case _:
            raise BadInput(f"{path} is not a safetensors file: {name} lacks a valid dtype, shape or data_offsets")
    if dtype not in TORCH_DTYPES:
        raise BadInput(f"{path}: {name} has the unknown dtype {dtype!r}; known are {', '.join(TORCH_DTYPES)}")
    num_bytes = math.prod(shape) * TORCH_DTYPES[dtype].itemsize
    if end - begin != num_bytes:
        raise BadInput(f"{path} has a wrong header: {name}, {dtype} {shape}, has {end - begin} bytes, not {num_bytes}")
    return TensorEntry(name, dtype, tuple(shape), num_bytes, path, data_start + begin)


def _check_extent(path: Path, entries: Sequence[TensorEntry], data_start: int, file_bytes: int) -> None:
    """Refuse tensors that overlap or leave gaps, and a file of another length than they need."""
    end = data_start
    misplaced = []
    for entry in entries:
        if entry.start != end:
            misplaced.append(f"{entry.name} ({'overlaps' if entry.start < end else 'leaves a gap after'} the previous)")
        end = entry.start + entry.num_bytes
    if misplaced:
        raise BadInput(f"{path} has a wrong header: {listing(misplaced)}")
    if file_bytes < end:
        raise BadInput(f"{path} is truncated: {end - file_bytes} of {end} bytes are missing; download or copy it again")
    if file_bytes > end:
        raise BadInput(f"{path} has a wrong header: {file_bytes - end} bytes follow the last tensor")


def _check_new(path: Path, ordered: Sequence[NewTensor]) -> None:
    counts = Counter([METADATA, *(new.name for new in ordered)])
    refused = [name for name, count in counts.items() if count > 1]
    if refused:
        raise BadInput(f"{path}: tensor names must be unique and not {METADATA}: {listing(refused)}")
    for new in ordered:
        if isinstance(new.source, TensorEntry | torch.Tensor):
            _check_source(path, new, new.source)


def _check_source(path: Path, new: NewTensor, source: TensorEntry | torch.Tensor) -> None:
    dtype = source.dtype if isinstance(source, TensorEntry) else DTYPE_NAMES.get(source.dtype)
    found, stated = f"{dtype} {list(source.shape)}", f"{new.dtype} {list(new.shape)}"
    if found != stated:
        raise BadInput(f"{path}: {new.name} is stated as {stated}, but its source is {found}")


def _header(ordered: Sequence[NewTensor], metadata: dict[str, str]) -> bytes:
    """Return the length and the JSON, padded with spaces as the format allows."""
    table: dict[str, object] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for new in ordered:
        begin, end = end, end + math.prod(new.shape) * TORCH_DTYPES[new.dtype].itemsize
        table[new.name] = {"dtype": new.dtype, "shape": list(new.shape), "data_offsets": [begin, end]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _copy(entry: TensorEntry, target: BinaryIO) -> None:
    buffer, left = memoryview(bytearray(min(CHUNK_BYTES, entry.num_bytes))), entry.num_bytes
    with entry.file.open("rb", buffering=0) as file:
        file.seek(entry.start)
        while left:
            count = _read_some(file, buffer[:left], entry)
            left -= target.write(buffer[:count])


def _read_some(file: RawIOBase, view: memoryview, entry: TensorEntry) -> int:
    if not (count := file.readinto(view)):
        raise BadInput(f"{entry.file} is truncated: it ends inside {entry.name}; download or copy it again")
    return count
