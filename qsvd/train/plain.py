"""Text that no chat template dresses: documents, and prompts with their completion.

What a tokenizer puts in front of every text (usually the start token) is in front here too; the end-of-sequence token
is put behind a text once, whether or not the tokenizer does so.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qsvd.train.tokenized import UNTRAINED, Marked

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
        ValueError: the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
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
