"""The safetensors format, read and written tensor by tensor (https://github.com/huggingface/safetensors, "Format").

The safetensors library maps a file into memory to read it and needs all tensors in memory to write it. Here every
tensor is read into its own buffer and written alone, so that the resident memory is known.

    8 bytes   length N of the header, little endian
    N bytes   JSON: name -> {"dtype", "shape", "data_offsets": [begin, end]}, and "__metadata__" -> {str: str}
    the rest  the tensors' bytes, row-major, little endian, without holes

A file that is written here has digests (XXH3, 128 bits) in its metadata: of the header, then of every tensor in the
order of their bytes. They are compared whenever the header or a whole tensor is read. They show damage; somebody who
changes a file on purpose can change them too.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from xxhash import xxh3_128 as new_digest

from qsvd.errors import BadInput, Damaged, listing
from qsvd.files.atomic import COPY_AGAIN, Stamp, check_stamp, stamp_of, whole_file

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
CHUNK_BYTES = 8 * 2**20  # read at a time
MOST_HEADER = 10**8  # bytes, as in the safetensors library
ALIGNMENT = 8  # the data start at a multiple of this, so that every tensor is aligned to its dtype
METADATA = "__metadata__"
DIGESTS = "qsvd_digests"  # in the metadata
DIGEST = 32  # characters of one


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
    stamp: Stamp  # of the file when its header was read
    digest: str = ""  # of its bytes; "" if the file has none

    def check(self, digest: new_digest) -> None:
        """Compare the digest of what was read; a Damaged where it differs."""
        if self.digest and self.digest != digest.hexdigest():
            raise Damaged(f"{self.file} is damaged at {self.name}: its digest differs; {COPY_AGAIN}")

    def rows(self, first: int, end: int) -> "TensorEntry":
        """Return the entry of the rows `first` to `end` - 1; they lie in one piece.

        Raises:
            BadInput: the tensor has fewer rows.
        """
        if not 0 <= first < end <= self.shape[0]:
            raise BadInput(f"{self.file}: {self.name} {list(self.shape)} has no rows {first} to {end - 1}")
        size = self.num_bytes // self.shape[0]
        shape = (end - first, *self.shape[1:])
        if shape == self.shape:
            return self
        return replace(self, shape=shape, start=self.start + first * size, num_bytes=(end - first) * size, digest="")

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
    digest: str = ""  # of the header, which has those of the tensors; "" if the file has none


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


def read_header(path: Path, *, needs_digests: bool = False) -> SafetensorsHeader:
    """Read the header of a safetensors file.

    Args:
        needs_digests: Refuse a file without digests: one of ours that lost them is damaged.

    Raises:
        BadInput: the file breaks the format, is truncated or is too long; the sentence names it and the fault.
        Damaged: the header differs from its digest.
    """
    with path.open("rb") as file:
        stamp = stamp_of(os.fstat(file.fileno()))
        length, left = int.from_bytes(file.read(8), "little"), stamp[0] - 8
        if not 0 <= length <= min(left, MOST_HEADER):
            asked = f"its header should have {length} bytes" if left >= 0 else "a header starts with 8 bytes"
            raise BadInput(f"{path} is truncated or not a safetensors file: {asked}, the file has {stamp[0]}")
        raw = file.read(length)
    table = _parse(path, raw)
    metadata = table.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise BadInput(f"{path} is not a safetensors file: {METADATA} must map strings to strings")
    digest, *digests = _digests(path, raw, metadata, len(table)) or [""] * (1 + len(table))
    if needs_digests and not digest:
        raise Damaged(f"{path} is damaged: it has lost its digests; {COPY_AGAIN}")
    entries = [_entry(path, name, fields, 8 + length, stamp) for name, fields in table.items()]
    entries.sort(key=lambda entry: (entry.start, entry.num_bytes))
    _check_extent(path, entries, 8 + length, stamp[0])
    tensors = {entry.name: replace(entry, digest=own) for entry, own in zip(entries, digests, strict=True)}
    return SafetensorsHeader(tensors, metadata, raw, digest)


def read_tensor(entry: TensorEntry, *, pinned: bool = False) -> torch.Tensor:
    """Read a tensor into its own memory, pinned for a GPU or not.

    Raises:
        BadInput: the file ends too early.
        Damaged: the tensor differs from its digest, or the file was changed since its header was read.
    """
    flat = torch.empty(entry.num_bytes, dtype=torch.uint8, pin_memory=pinned and entry.num_bytes > 0)
    view = flat.numpy().data
    for _ in read_pieces(entry, lambda done: view[done : done + CHUNK_BYTES]):
        pass
    return flat.view(TORCH_DTYPES[entry.dtype]).reshape(entry.shape)


def digest_of(tensor: torch.Tensor) -> str:
    """Return the digest of the bytes of a tensor in CPU memory."""
    return new_digest(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def read_pieces(entry: TensorEntry, place: Callable[[int], memoryview]) -> Iterator[memoryview]:
    """Read the bytes of a tensor, and yield them piece by piece; raise what `read_tensor` raises.

    Args:
        place: Returns where the bytes from an offset in the tensor on are read to.
    """
    done, digest = 0, new_digest()
    with entry.file.open("rb", buffering=0) as file:
        if not entry.digest:
            check_stamp(entry.file, os.fstat(file.fileno()), entry.stamp)
        file.seek(entry.start)
        while done < entry.num_bytes:
            view = place(done)[: entry.num_bytes - done]
            if not (count := file.readinto(view)):
                raise BadInput(f"{entry.file} is truncated: it ends inside {entry.name}; download or copy it again")
            digest.update(view[:count])
            done += count
            yield view[:count]
    entry.check(digest)


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
    header, place = _header(ordered, metadata)
    digests = []
    with whole_file(path) as file:
        file.write(header)
        for new in ordered:
            digests.append(_write_tensor(file, path, new))
        filled = header[:place] + "".join(digests).encode() + header[place + DIGEST * len(digests) :]
        file.seek(place - DIGEST)
        file.write(new_digest(filled[8:]).hexdigest().encode() + filled[place : place + DIGEST * len(digests)])


def _write_tensor(file: BinaryIO, path: Path, new: NewTensor) -> str:
    """Write the bytes of a tensor and return their digest; nothing keeps them while the next tensor is made."""
    digest = new_digest()
    for piece in _pieces(path, new):
        digest.update(piece)
        file.write(piece)
    return digest.hexdigest()


def _pieces(path: Path, new: NewTensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor to write."""
    if isinstance(new.source, TensorEntry):
        buffer = memoryview(bytearray(min(CHUNK_BYTES, new.source.num_bytes)))
        yield from read_pieces(new.source, lambda _: buffer)
        return
    values = new.source if isinstance(new.source, torch.Tensor) else new.source()
    _check_source(path, new, values)
    yield values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _digests(path: Path, raw: bytes, metadata: dict[str, str], count: int) -> list[str]:
    """Take the digests out of the metadata, compare that of the header, and return all; [] without any."""
    if (text := metadata.pop(DIGESTS, None)) is None:
        return []
    is_whole = len(text) == DIGEST * (1 + count)
    if not is_whole or text[:DIGEST] != new_digest(raw.replace(text.encode(), _cleared(text))).hexdigest():
        raise Damaged(f"{path} is damaged: its header differs from its digest; {COPY_AGAIN}")
    return [text[start : start + DIGEST] for start in range(0, len(text), DIGEST)]


def _cleared(text: str) -> bytes:
    """Return digests as they were when that of the header was computed: its own place has zeros."""
    return b"0" * DIGEST + text[DIGEST:].encode()


def _parse(path: Path, raw: bytes) -> dict:
    def no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
        table = dict(pairs)
        if len(table) < len(pairs):
            raise BadInput("a name comes twice")
        return table

    try:
        table = json.loads(raw, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not a safetensors file: its header is not valid JSON ({error})") from error
    if not isinstance(table, dict):
        raise BadInput(f"{path} is not a safetensors file: its header is a JSON {type(table).__name__}, not an object")
    return table


def _entry(path: Path, name: str, fields: object, data_start: int, stamp: Stamp) -> TensorEntry:
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
    return TensorEntry(name, dtype, tuple(shape), num_bytes, path, data_start + begin, stamp)


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


def _header(ordered: Sequence[NewTensor], metadata: dict[str, str]) -> tuple[bytes, int]:
    """Return the length and the JSON, padded with spaces as the format allows, and where the tensors' digests begin."""
    known = {DIGESTS: "0" * DIGEST * (1 + len(ordered))}
    table: dict[str, object] = {METADATA: {**known, **dict(sorted(metadata.items()))}}
    end = 0
    for new in ordered:
        begin, end = end, end + math.prod(new.shape) * TORCH_DTYPES[new.dtype].itemsize
        table[new.name] = {"dtype": new.dtype, "shape": list(new.shape), "data_offsets": [begin, end]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    start = f'{{"{METADATA}":{{"{DIGESTS}":"'
    return len(text).to_bytes(8, "little") + text, 8 + len(start) + DIGEST
