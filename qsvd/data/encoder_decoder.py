"""Examples of an encoder-decoder model: what its encoder reads, and what its decoder writes."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qsvd.data.columns import UNTRAINED, Examples, Row, Tokenized
from qsvd.data.images import digested
from qsvd.data.media import AUDIO, MediaRows, open_sound
from qsvd.data.plain import start_tokens
from qsvd.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def end_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the tokens that the tokenizer adds after a text."""
    whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    return whole[len(start_tokens(tokenizer)) + len(bare) :]


def sources_and_targets(
    data: Tokenized, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the tokens that the encoder reads and those that the decoder learns, of each example.

    The target is what is trained at the end of an example, the source all before it. Both have the special tokens that
    the tokenizer puts around a text.

    Raises:
        BadInput: an example is trained from its first token on.
    """
    if data.kind == "speech":  # the encoder hears; only the length of a source counts
        return list(data.input_ids), list(data.input_ids)
    start, end = start_tokens(tokenizer), end_tokens(tokenizer)
    sources, targets = [], []
    for number, (tokens, labels) in enumerate(zip(data.input_ids, data.labels, strict=True)):
        assert isinstance(labels, list), "examples of a classifier have no answer"
        begin = answer_begins(labels)
        if begin == 0:
            raise BadInput(
                f"{data.places.where(number)} has no prompt: an encoder-decoder model reads a prompt and writes a "
                "completion; give examples with both (columns prompt and completion), and --loss-on answers"
            )
        sources.append([*tokens[:begin], *end])
        targets.append([*start, *tokens[begin:]])
    return sources, targets


def answer_begins(labels: Sequence[int]) -> int:
    """Return the place of the first trained token of the last answer."""
    place = max(number for number, label in enumerate(labels) if label != UNTRAINED)
    while place and labels[place - 1] != UNTRAINED:
        place -= 1
    return place


def as_dataset(data: Tokenized, tokenizer: "PreTrainedTokenizerBase") -> Any:
    """Return a datasets.Dataset with the columns input_ids, of the encoder, and labels, of the decoder."""
    from datasets import Dataset

    sources, targets = sources_and_targets(data, tokenizer)
    return Dataset.from_dict({"input_ids": sources, "labels": targets})


def tokenize_sounds(examples: Examples, processor: Any, *, max_length: int, first_token: int | None) -> Tokenized:
    """Return what the decoder learns of each sound: its text with the tokens that the tokenizer puts around a text.

    An example whose text is longer than max_length is left out whole and counted.

    Args:
        examples: Sounds with their texts.
        processor: The model's feature extractor and tokenizer.
        first_token: The token that the model itself puts in front of all.

    Raises:
        BadInput: a sound cannot be opened, or is longer than the model hears (all are counted, the first few are
            shown); nothing is short enough.
    """
    extractor, rows = processor.feature_extractor, []
    for row in examples.rows:
        ids = processor.tokenizer(row["text"])["input_ids"]
        rows.append({AUDIO: row[AUDIO], "labels": ids[1:] if ids[:1] == [first_token] else ids})
    data = MediaRows(
        rows,
        Path(examples.places.source).parent,
        processor,
        partial(_collate, extractor=extractor),
        opened=partial(_open_row, rate=extractor.sampling_rate, longest=getattr(extractor, "n_samples", None)),
    )
    data = digested(examples, data, lambda index: data.batch([index]))
    lengths = [len(row["labels"]) for row in rows]
    kept = [index for index, length in enumerate(lengths) if length <= max_length]
    if not kept:
        raise BadInput(
            f"{examples.places.source}: no text has at most {max_length} tokens; the shortest has {min(lengths)}: "
            "raise --max-length"
        )
    left_out, written = len(rows) - len(kept), [rows[index]["labels"] for index in kept]
    return Tokenized(
        "speech",
        written,
        written,
        examples.places.take(kept),
        truncated=left_out,
        dropped=left_out,
        cut_tokens=sum(lengths) - sum(map(len, written)),
        columns=examples.columns,
        media=data.take(kept),
    )


def _open_row(row: Row, folder: Path, *, rate: int, longest: int | None) -> Row:
    return row | {AUDIO: open_sound(row[AUDIO], folder, rate=rate, longest=longest), "rate": rate}


def _collate(rows: list[Row], *, extractor: Any) -> dict[str, Tensor]:
    """Return the spectrograms of sounds, and the labels of their texts, padded on the right."""
    read = extractor([row[AUDIO] for row in rows], sampling_rate=rows[0]["rate"], return_tensors="pt")
    labels = [torch.tensor(row["labels"]) for row in rows]
    return dict(read) | {"labels": pad_sequence(labels, batch_first=True, padding_value=UNTRAINED)}
