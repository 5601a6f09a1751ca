"""Texts, or pairs of texts, with a class each."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qsvd.plan.listing import listing
from qsvd.train.columns import Examples
from qsvd.train.plain import BATCH
from qsvd.train.rows import refusal
from qsvd.train.tokenized import Tokenized

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize_labelled(
    examples: Examples, tokenizer: "PreTrainedTokenizerBase", max_length: int, label_names: Sequence[str] | None
) -> Tokenized:
    """Tokens with those that the tokenizer adds, cut at max_length, and the number of each class.

    Args:
        examples: Of the kind labelled.
        tokenizer: Cuts the longer one of two texts first.
        max_length: Tokens.
        label_names: The classes in the order of their numbers, as the training rows gave them; None finds them.

    Raises:
        ValueError: max_length has no room for text; what `find_labels` refuses; a label that is not in label_names.
    """
    pairs = any(row["text_pair"] is not None for row in examples.rows)
    added = tokenizer.num_special_tokens_to_add(pair=pairs)
    if max_length <= added:
        raise ValueError(f"max_length {max_length} is not above {added}, the tokens that the tokenizer adds to a text")
    names = find_labels(examples) if label_names is None else tuple(label_names)
    labels = _numbers(examples, names)
    ids, types, truncated = [], [], 0
    for start in range(0, len(examples.rows), BATCH):
        batch = examples.rows[start : start + BATCH]
        first, second = [row["text"] for row in batch], [row["text_pair"] or "" for row in batch] if pairs else None
        whole = tokenizer(first, second, verbose=False, return_attention_mask=False)
        lengths = [len(tokens) for tokens in whole["input_ids"]]
        cut = tokenizer(first, second, truncation=True, max_length=max_length) if max(lengths) > max_length else whole
        truncated += sum(length > max_length for length in lengths)
        ids += cut["input_ids"]
        types += cut["token_type_ids"] if pairs and "token_type_ids" in cut else []
    return Tokenized("labelled", ids, labels, examples.places, truncated, 0, names, types or None)


def find_labels(examples: Examples) -> tuple[str, ...]:
    """The classes in the order of their numbers: names sorted, or integers 0..n-1 as text.

    A label that is an integer written as text counts as an integer: a CSV file has no other.

    Raises:
        ValueError: names and integers mixed, integers other than 0..n-1, or fewer than two classes.
    """
    found = {str(row["label"]): index for index, row in reversed(list(enumerate(examples.rows)))}
    source, integers = examples.places.source, [name for name in found if _is_integer(name)]
    if integers and len(integers) < len(found):
        names = [name for name in found if name not in integers]
        raise ValueError(
            f"{source} has integers and names as labels: {integers[0]} in {examples.places.short(found[integers[0]])}, "
            f"{names[0]!r} in {examples.places.short(found[names[0]])}; write all of them in one way"
        )
    if len(found) < 2:
        raise ValueError(f"{source} has one class only, {next(iter(found))!r}; there is nothing to tell apart")
    if not integers:
        return tuple(sorted(found))
    expected = [str(number) for number in range(len(found))]
    wrong = sorted(set(integers) - set(expected), key=int)
    if wrong:
        shown = listing([f"{name} in {examples.places.short(found[name])}" for name in wrong])
        raise ValueError(
            f"{source} has {len(found)} classes, so that integer labels must be 0..{len(found) - 1}, but there is "
            f"{shown}; number the classes from 0 without gaps, or give them names"
        )
    return tuple(expected)


def _numbers(examples: Examples, names: Sequence[str]) -> list[int]:
    numbers = {name: number for number, name in enumerate(names)}
    unknown = [
        (examples.places.short(index), repr(row["label"]))
        for index, row in enumerate(examples.rows)
        if str(row["label"]) not in numbers
    ]
    if unknown:
        raise ValueError(
            f"{refusal(examples.places.source, 'unknown label', unknown)}; known are {listing(list(names), limit=20)}"
        )
    return [numbers[str(row["label"])] for row in examples.rows]


def _is_integer(name: str) -> bool:
    """Whether the name is an integer in its one usual spelling: "7", not "007" or "+7"."""
    return name.removeprefix("-").isdecimal() and name == str(int(name))
