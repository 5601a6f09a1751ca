"""Examples of an encoder-decoder model: what its encoder reads, and what its decoder writes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qsvd.data.columns import UNTRAINED, Tokenized
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
