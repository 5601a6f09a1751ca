"""One example as the model reads it, with the trained tokens in brackets, to check before a long run."""

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from rich.text import Text

from qsvd.data.columns import UNTRAINED, Tokenized
from qsvd.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAINED = "bold green"
OPEN, CLOSE = "[[", "]]"  # visible on a terminal without colours


def preview(tokenized: Tokenized, tokenizer: "PreTrainedTokenizerBase", index: int = 0) -> Text:
    """Return a line with the place of the example and the share of trained tokens, then the decoded example.

    Trained tokens are in [[ ]] and coloured. For labelled text the first line names the class.

    Raises:
        BadInput: index is outside the sequences.
    """
    count = len(tokenized.input_ids)
    if not 0 <= index < count:
        raise BadInput(f"example {index} is outside 0..{count - 1}, the sequences of {tokenized.places.source}")
    tokens, label = tokenized.input_ids[index], tokenized.labels[index]
    if isinstance(label, int):
        head = f"{tokenized.where(index)}: {len(tokens)} tokens, label {label} ({tokenized.label_names[label]})"
        return Text(f"{head}\n{_decode(tokens, tokenizer)}")
    trained = [one != UNTRAINED for one in label]
    share = sum(trained) / len(tokens)
    text = Text(f"{tokenized.where(index)}: {len(tokens)} tokens, {sum(trained)} trained ({share:.0%})\n")
    for piece, is_trained in _pieces(tokens, trained, tokenizer):
        text.append(f"{OPEN}{piece}{CLOSE}" if is_trained else piece, style=TRAINED if is_trained else None)
    return text


def _pieces(tokens: list[int], trained: list[bool], tokenizer: "PreTrainedTokenizerBase") -> Iterator[tuple[str, bool]]:
    """Yield runs of trained or untrained tokens as text; a token that is decoded alone may lose its space."""
    end, before = 0, ""
    for is_trained, run in groupby(trained):
        end += len(list(run))
        text = _decode(tokens[:end], tokenizer)
        yield text[len(before) :], is_trained
        before = text


def _decode(tokens: list[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))
