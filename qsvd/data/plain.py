"""Token ids of text without a chat template: documents, prompts with their completion, labelled texts.

A text starts with the tokens that the tokenizer adds in front (usually the start token) and ends with one
end-of-sequence token, even if the tokenizer does not add it. A text that has them already gets no second ones.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qsvd.data.columns import UNTRAINED, Examples, Marked, Tokenized
from qsvd.data.row_files import refusal
from qsvd.errors import BadInput, listing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 1000  # texts for one call of a tokenizer
ANCHOR = "\n"  # put before a text that is tokenized as the middle of a longer one


def encode(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Return the tokens of each text, without special tokens."""
    tokens = []
    for start in range(0, len(texts), BATCH):
        batch = list(texts[start : start + BATCH])
        tokens += tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return tokens


def start_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the tokens that the tokenizer adds in front of a text."""
    whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    starts = range(len(whole) - len(bare) + 1)
    start = next((start for start in starts if whole[start : start + len(bare)] == bare), None)
    assert start is not None, "special tokens are around a text and do not change its tokens"
    return whole[:start]


def documents(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> list[list[Marked]]:
    """Return the windows of each text, of at most max_length tokens, all trained.

    A window starts with the last token of the window before it, untrained, so that every token of the text except the
    first is predicted once. If the tokenizer has no end-of-sequence token, the text has none.
    """
    end_token: Any = tokenizer.eos_token_id
    end = [] if end_token is None else [end_token]
    return [_windows(_ended(tokens, end), max_length) for tokens in prompts(texts, tokenizer)]


def prompts(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Return the tokens of each prompt, as they are before a completion."""
    start = start_tokens(tokenizer)
    return [tokens if tokens[: len(start)] == start else [*start, *tokens] for tokens in encode(texts, tokenizer)]


def _ended(tokens: list[int], end: list[Any]) -> list[int]:
    return tokens if tokens[-len(end) :] == end else [*tokens, *end]


def pairs(given: Sequence[str], completions: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[Marked]:
    """Return prompt, completion and end-of-sequence token of each pair; the last two are trained.

    The prompt is tokenized alone, as it is when the model generates, even if the tokenizer would merge its end with the
    start of the completion.

    Raises:
        BadInput: the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise BadInput(
            "the tokenizer has no end-of-sequence token, so the model could not learn where an answer ends; "
            "set eos_token in its tokenizer_config.json"
        )
    whole = prompts([prompt + completion for prompt, completion in zip(given, completions, strict=True)], tokenizer)
    sequences = []
    for prompt, joined, completion in zip(prompts(given, tokenizer), whole, completions, strict=True):
        fits = joined[: len(prompt)] == prompt
        answer = joined[len(prompt) :] if fits else _continuation(completion, tokenizer)
        trained = _ended(answer, [tokenizer.eos_token_id])
        sequences.append(Marked([*prompt, *trained], [UNTRAINED] * len(prompt) + trained))
    return sequences


def _windows(tokens: list[int], length: int) -> list[Marked]:
    windows = []
    for start in range(0, max(1, len(tokens) - 1), length - 1):
        window = tokens[start : start + length]
        windows.append(Marked(window, [UNTRAINED, *window[1:]] if start else list(window)))
    return windows


def _continuation(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the tokens of a text inside another: some tokenizers add a space before the first word of a text."""
    anchor, both = encode([ANCHOR, ANCHOR + text], tokenizer)
    return both[len(anchor) :] if both[: len(anchor)] == anchor else encode([text], tokenizer)[0]


# Texts, or pairs of texts, each with a class.


def tokenize_labelled(
    examples: Examples, tokenizer: "PreTrainedTokenizerBase", max_length: int, label_names: Sequence[str] | None
) -> Tokenized:
    """Return the tokens of each text, special tokens included, cut at max_length, and the index of its class.

    Args:
        examples: Of the kind labelled.
        tokenizer: It cuts the longer one of two texts first.
        max_length: Tokens.
        label_names: The classes by index, as in the training rows; None finds them.

    Raises:
        BadInput: max_length leaves no token for the text; as `find_labels`; a label that is not in label_names.
    """
    pairs = any(row["text_pair"] is not None for row in examples.rows)
    added = tokenizer.num_special_tokens_to_add(pair=pairs)
    if max_length <= added:
        raise BadInput(
            f"max_length {max_length} is not above {added}, the special tokens that the tokenizer adds to a text"
        )
    names = find_labels(examples) if label_names is None else tuple(label_names)
    labels = _numbers(examples, names)
    ids, types, truncated, cut_tokens = [], [], 0, 0
    for start in range(0, len(examples.rows), BATCH):
        batch = examples.rows[start : start + BATCH]
        first, second = [row["text"] for row in batch], [row["text_pair"] or "" for row in batch] if pairs else None
        whole = tokenizer(first, second, verbose=False, return_attention_mask=False)
        lengths = [len(tokens) for tokens in whole["input_ids"]]
        cut = tokenizer(first, second, truncation=True, max_length=max_length) if max(lengths) > max_length else whole
        truncated += sum(length > max_length for length in lengths)
        cut_tokens += sum(max(0, length - max_length) for length in lengths)
        ids += cut["input_ids"]
        types += cut["token_type_ids"] if pairs and "token_type_ids" in cut else []
    return Tokenized(
        "labelled", ids, labels, examples.places, truncated, 0, names, types or None, cut_tokens, examples.columns
    )


def find_labels(examples: Examples) -> tuple[str, ...]:
    """Return the classes by index: names sorted, or the integers 0..n-1 as text.

    An integer written as text counts as an integer, because a CSV file has only text.

    Raises:
        BadInput: the labels mix names and integers, are integers other than 0..n-1, or are fewer than two classes.
    """
    found = {str(row["label"]): index for index, row in reversed(list(enumerate(examples.rows)))}
    source, integers = examples.places.source, [name for name in found if _is_integer(name)]
    if integers and len(integers) < len(found):
        names = [name for name in found if name not in integers]
        raise BadInput(
            f"{source} has integers and names as labels: {integers[0]} in {examples.places.short(found[integers[0]])}, "
            f"{names[0]!r} in {examples.places.short(found[names[0]])}; write all of them in the same way"
        )
    if len(found) < 2:
        raise BadInput(f"{source} has only one class, {next(iter(found))!r}; a classifier needs two or more")
    if not integers:
        return tuple(sorted(found))
    expected = [str(number) for number in range(len(found))]
    wrong = sorted(set(integers) - set(expected), key=int)
    if wrong:
        shown = listing([f"{name} in {examples.places.short(found[name])}" for name in wrong])
        raise BadInput(
            f"{source} has {len(found)} classes, so integer labels must be 0..{len(found) - 1}, but there is "
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
            f"{refusal(examples.places.source, 'unknown label', unknown)}; known labels are {listing(names, limit=20)}"
        )
    return [numbers[str(row["label"])] for row in examples.rows]


def _is_integer(name: str) -> bool:
    """Return whether the name is an integer in its usual spelling: "7", not "007" or "+7"."""
    return name.removeprefix("-").isdecimal() and name == str(int(name))
