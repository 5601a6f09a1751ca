"""Images and sounds of rows: where a row names them, how they are opened, and rows whose tensors are made by batch.

A row has images in its column `images` or `image`, or in parts of its messages ({"type": "image", "path": FILE}), and a
sound in its column `audio`.
"""

import base64
import binascii
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qsvd.errors import BadInput, first_line, listing

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]
Source = str | bytes  # a path or a data URI; the bytes of a file

COLUMNS = ("images", "image")
PAYLOADS = ("image", "path", "url", "base64")  # keys of a part of a message, as transformers' chat templates have them
SIDES = ("messages", "prompt", "completion")
URI = ";base64,"  # between the kind of a data URI and its bytes
WEB = ("http://", "https://")
AUDIO = "audio"
FULL_SCALE = {"int16": 2**15, "int32": 2**31}  # of whole numbers in WAV files; 24 bits are read as 32


def gather(row: Row, given: object, column: str) -> Row:
    """Return an example with all its images in "images", in the order of their places in its messages.

    Parts of messages keep {"type": "image"} as the place. An example without images is returned as it is.

    Args:
        row: An example in our columns.
        given: The value of the column of images, or None.
        column: Its name, for messages.

    Raises:
        BadInput: a part of a message has an unknown type or two images, there are images in the column and in parts, or
            the parts have places for another number of images.
    """
    named = sources_of(given, column)
    parts: list[Source] = []
    places = 0
    found = dict(row)
    for side in SIDES:
        if isinstance(row.get(side), list):
            messages = [_read_parts(message, f"{side}[{n}]", parts) for n, message in enumerate(row[side])]
            places += sum(_places(message) for message in messages)
            found[side] = messages
    if named and parts:
        raise BadInput(f"{column} and parts of messages both have images: give them in one of the two")
    images = named or parts
    if places and places != len(images):
        raise BadInput(f"the messages have places for {places} images, and there are {len(images)}")
    return found | {"images": images} if images else row


def sources_of(value: object, column: str) -> list[Source]:
    """Return the images of a column: a path, bytes, {"bytes", "path"} as the datasets library has it, or a list."""
    if value is None:
        return []
    items = value if isinstance(value, list) else [value]
    return [_source(item, column) for item in items if item is not None]


def _source(item: object, place: str, what: str = "an image") -> Source:
    if isinstance(item, dict):
        held = [item[key] for key in ("bytes", *PAYLOADS) if item.get(key) is not None]
        item = held[0] if held else None
    if not isinstance(item, str | bytes) or not item:
        raise BadInput(f"{place} has {type(item).__name__} in the place of {what}: give a path, bytes or a data URI")
    return item


def _read_parts(message: Row, place: str, images: list[Source]) -> Row:
    """Return a message whose parts have no images, which are added to `images`."""
    if not isinstance(message.get("content"), list):
        return message
    return message | {"content": [_part(p, f"{place}.content[{n}]", images) for n, p in enumerate(message["content"])]}


def _part(part: object, place: str, images: list[Source]) -> Row:
    kept = {name: value for name, value in part.items() if value is not None} if isinstance(part, dict) else {}
    kind = kept.get("type")
    if kind == "text" and isinstance(kept.get("text"), str):
        return kept
    if kind != "image":
        shown = "no type" if kind is None else "no text" if kind == "text" else f"the type {kind!r}"
        raise BadInput(f"{place} has {shown}; a part of a message is a text or an image")
    held = [name for name in PAYLOADS if name in kept]
    if len(held) > 1:
        raise BadInput(f"{place} has {' and '.join(held)}: give one of them")
    for name in held:
        source = _source(kept[name], place)
        images.append(f"data:image/unknown{URI}{source}" if name == "base64" else source)
    return {"type": "image"}


def _places(message: Row) -> int:
    content = message.get("content")
    return sum(part["type"] == "image" for part in content) if isinstance(content, list) else 0


def open_image(source: Source, folder: Path) -> Any:
    """Return an image as transformers loads it: turned as its EXIF data say, in RGB.

    Args:
        folder: From which relative paths count.

    Raises:
        BadInput: there is no such file, it is not an image, it is on the web, or Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise BadInput(NO_PILLOW) from error
    from transformers.image_utils import load_image

    name = _shown(source, "an image that is given as bytes")
    Image.init()
    try:
        with Image.open(_file(source, folder), formats=[one for one in FORMATS if one in Image.OPEN]) as image:
            return load_image(image)
    except FileNotFoundError as error:
        raise BadInput(f"no such file: {folder / name}") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{name} is not an image that Pillow can read: {first_line(error)}") from error


def open_images(sources: Sequence[Source], folder: Path) -> list[Any]:
    """Open images; a BadInput names all that cannot be opened."""
    return open_each(sources, partial(open_image, folder=folder))


def open_each(sources: Sequence[Source], opener: Callable[[Source], Any]) -> list[Any]:
    """Open images or sounds; a BadInput names all that cannot be opened."""
    opened, problems = [], []
    for source in sources:
        try:
            opened.append(opener(source))
        except BadInput as error:
            problems.append(str(error))
    if problems:
        raise BadInput(listing(problems, separator="; "))
    return opened


FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")  # EPS runs Ghostscript
NO_PILLOW = "images need the library Pillow: pip install 'qsvd[images]'"


def read_row_sound(row: Row) -> Row:
    """Return {"audio", "text"} of a row; its sound is a path, bytes, or what the datasets library keeps."""
    given = row[AUDIO]
    is_decoded = isinstance(given, dict) and given.get("array") is not None
    if not isinstance(row["text"], str) or not row["text"].strip():
        raise BadInput("text has no words that a model could write of the sound")
    return {AUDIO: given if is_decoded else _source(given, AUDIO, "a sound"), "text": row["text"]}


def open_sound(source: Source | dict[str, Any], folder: Path, rate: int, longest: int | None = None) -> np.ndarray:
    """Return a sound as float32 [samples], one channel, at `rate` samples a second.

    Args:
        source: A WAV file, its bytes, or {"array", "sampling_rate"}.
        folder: From which relative paths count.
        longest: Most samples that the model hears.

    Raises:
        BadInput: there is no such file, it is not WAV, it has no samples, or it is longer than the model hears.
    """
    from scipy import signal

    samples, own = _samples(source, folder)
    if samples.ndim == 2:  # [samples, channels]
        samples = samples.mean(axis=1)
    if not samples.size or samples.ndim != 1:
        raise BadInput(f"{_shown(source)} has no samples")
    common = math.gcd(own, rate)
    sound = signal.resample_poly(samples, rate // common, own // common).astype(np.float32)
    if longest is not None and len(sound) > longest:
        lasts, most = len(sound) / rate, longest / rate
        raise BadInput(f"{_shown(source)} lasts {lasts:.1f} s, and the model hears {most:g} s: divide it")
    return sound


def _samples(source: Source | dict[str, Any], folder: Path) -> tuple[np.ndarray, int]:
    """Return the samples of a sound, from -1 to 1, and their number a second."""
    from scipy.io import wavfile

    if isinstance(source, dict):
        return np.asarray(source["array"], dtype=np.float64), int(source["sampling_rate"])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # parts that are no sound
            rate, samples = wavfile.read(_file(source, folder))
    except FileNotFoundError as error:
        raise BadInput(f"no such file: {folder / _shown(source)}") from error
    except (OSError, ValueError, EOFError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{_shown(source)} is not a WAV file that SciPy can read: {first_line(error)}") from error
    if samples.dtype == np.uint8:
        return (samples - 128.0) / 128.0, rate
    return samples / FULL_SCALE.get(samples.dtype.name, 1.0), rate


def _shown(source: Source | dict[str, Any], otherwise: str = "a sound that is given as bytes or numbers") -> str:
    """Return a path, or the beginning of a data URI."""
    if not isinstance(source, str):
        return otherwise
    return source[:60] if source.startswith("data:") else source


def _file(source: Source, folder: Path) -> BytesIO | Path:
    if isinstance(source, bytes):
        return BytesIO(source)
    if source.startswith("data:"):
        try:
            return BytesIO(base64.b64decode(source.partition(URI)[2], validate=True))
        except binascii.Error as error:
            raise BadInput(f"an image is not base64: {error}") from error
    if source.startswith(WEB):
        raise BadInput(f"{source} is on the web: download it, and give its path")
    return folder / Path(source).expanduser()


def open_row(row: Row, folder: Path) -> Row:
    """Return a row with its images open; a BadInput names all that cannot be opened."""
    return row | {"images": open_images(row["images"], folder)}


@dataclass(frozen=True)
class MediaRows:
    """Rows with images or sounds, which are opened when a row is taken.

    Args:
        rows: {"images": sources, "messages"} or {"images", "prompt", "completion"}; or {"audio": source, "labels"}.
        folder: From which relative paths count.
        processor: The model's.
        collate: Makes tensors of rows; of images, TRL's DataCollatorForVisionLanguageModeling.
        digests: SHA-256, in hex, of what the processor makes of the images or the sound of each row.
        pixels: Numbers that the processor makes of the images or the sound of the row with most of them.
        opened: Opens what a row names.
    """

    rows: Sequence[Row]
    folder: Path
    processor: Any
    collate: Callable[[list[Row]], Any]
    digests: Sequence[str] = ()
    pixels: int = 0
    opened: Callable[[Row, Path], Row] = open_row

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        """Return a row with its images or its sound open. Its tensors are made by `collate`."""
        return self.opened(self.rows[index], self.folder)

    def batch(self, indexes: Sequence[int]) -> dict[str, Any]:
        """Return the tensors of some rows, padded on the right; "labels" among them."""
        return dict(self.collate([self[index] for index in indexes]))

    def as_dataset(self) -> "Dataset":
        """Return a data set of the numbers of the rows, named as TRL knows data with images by; see `batch_of`."""
        from datasets import Dataset

        return Dataset.from_dict({COLUMNS[0]: range(len(self.rows))})

    def batch_of(self, numbered: Sequence[Row]) -> dict[str, Any]:
        """Return the tensors of some rows of `as_dataset`."""
        return self.batch([row[COLUMNS[0]] for row in numbered])

    def take(self, indexes: Sequence[int]) -> "MediaRows":
        """Return some rows, in the order given."""
        digests = [self.digests[index] for index in indexes]
        return replace(self, rows=[self.rows[index] for index in indexes], digests=digests)
