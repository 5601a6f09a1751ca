"""Text that no chat template dresses: documents, and prompts with their completion.

What a tokenizer puts in front of every text (usually the start token) is in front here too; the end-of-sequence token
is put behind a text once, whether or not the tokenizer does so.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qsvd.data.columns import UNTRAINED, Examples, Marked, Tokenized
from qsvd.data.row_files import refusal
from qsvd.errors import BadInput, listing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 1000  # texts that a tokenizer gets at once
ANCHOR = "\n"  # stands before a text to be tokenized as the middle of a longer one


def encode(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """The tokens of each text, without any that the tokenizer would add."""
    tokens = []
    for start in range(0, len(texts), BATCH):
        batch = list(texts[start : start + BATCH])
        tokens += tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return tokens


def start_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """What the tokenizer puts in front of a text."""
    whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    starts = range(len(whole) - len(bare) + 1)
    start = next((start for start in starts if whole[start : start + len(bare)] == bare), None)
    assert start is not None, "special tokens stand around a text and do not change its own"
    return whole[:start]


def documents(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> list[list[Marked]]:
    """For each text its windows of at most max_length tokens, all trained.

    A window starts with the last token of the one before it, untrained there, so that every token of the text but the
    first is predicted once. A tokenizer without an end-of-sequence token leaves the end open.
    """
    end_token: Any = tokenizer.eos_token_id
    start, end = start_tokens(tokenizer), [] if end_token is None else [end_token]
    return [_windows([*start, *tokens, *end], max_length) for tokens in encode(texts, tokenizer)]


def prompts(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """The tokens of each prompt, as they stand before a completion."""
    start = start_tokens(tokenizer)
    return [[*start, *tokens] for tokens in encode(texts, tokenizer)]


def pairs(given: Sequence[str], completions: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[Marked]:
    """Prompt, completion and end-of-sequence token; the last two are trained.

    The tokens of the prompt are those of the prompt alone, as they will be when the model is asked, also where the
    tokenizer would join its end with the start of the completion.

    Raises:
        BadInput: the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise BadInput(
            "the tokenizer has no end-of-sequence token, so that a model could not learn where an answer ends; "
            "set eos_token in its tokenizer_config.json"
        )
    whole = prompts([prompt + completion for prompt, completion in zip(given, completions, strict=True)], tokenizer)
    sequences = []
    for prompt, joined, completion in zip(prompts(given, tokenizer), whole, completions, strict=True):
        fits = joined[: len(prompt)] == prompt
        answer = joined[len(prompt) :] if fits else _continuation(completion, tokenizer)
        trained = [*answer, tokenizer.eos_token_id]
        sequences.append(Marked([*prompt, *trained], [UNTRAINED] * len(prompt) + trained))
    return sequences


def _windows(tokens: list[int], length: int) -> list[Marked]:
    windows = []
    for start in range(0, max(1, len(tokens) - 1), length - 1):
        window = tokens[start : start + length]
        windows.append(Marked(window, [UNTRAINED, *window[1:]] if start else list(window)))
    return windows


def _continuation(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens of a text in the middle of another: some tokenizers put a space before the first word of a text."""
    anchor, both = encode([ANCHOR, ANCHOR + text], tokenizer)
    return both[len(anchor) :] if both[: len(anchor)] == anchor else encode([text], tokenizer)[0]


# Texts, or pairs of texts, with a class each.


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
        BadInput: max_length has no room for text; what `find_labels` refuses; a label that is not in label_names.
    """
    pairs = any(row["text_pair"] is not None for row in examples.rows)
    added = tokenizer.num_special_tokens_to_add(pair=pairs)
    if max_length <= added:
        raise BadInput(f"max_length {max_length} is not above {added}, the tokens that the tokenizer adds to a text")
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
        BadInput: names and integers mixed, integers other than 0..n-1, or fewer than two classes.
    """
    found = {str(row["label"]): index for index, row in reversed(list(enumerate(examples.rows)))}
    source, integers = examples.places.source, [name for name in found if _is_integer(name)]
    if integers and len(integers) < len(found):
        names = [name for name in found if name not in integers]
        raise BadInput(
            f"{source} has integers and names as labels: {integers[0]} in {examples.places.short(found[integers[0]])}, "
            f"{names[0]!r} in {examples.places.short(found[names[0]])}; write all of them in one way"
        )
    if len(found) < 2:
        raise BadInput(f"{source} has one class only, {next(iter(found))!r}; there is nothing to tell apart")
    if not integers:
        return tuple(sorted(found))
    expected = [str(number) for number in range(len(found))]
    wrong = sorted(set(integers) - set(expected), key=int)
    if wrong:
        shown = listing([f"{name} in {examples.places.short(found[name])}" for name in wrong])
        raise BadInput(
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
        raise BadInput(
            f"{refusal(examples.places.source, 'unknown label', unknown)}; known are {listing(list(names), limit=20)}"
        )
    return [numbers[str(row["label"])] for row in examples.rows]


def _is_integer(name: str) -> bool:
    """Whether the name is an integer in its one usual spelling: "7", not "007" or "+7"."""
    return name.removeprefix("-").isdecimal() and name == str(int(name))
