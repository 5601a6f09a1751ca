"""Characters that are trained -> tokens that are trained; and whether a turn ends with a token that ends it."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from qsvd.data.chat import Chat, Span
from qsvd.data.columns import UNTRAINED, Marked, marked
from qsvd.data.plain import BATCH
from qsvd.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def mark_chats(
    chats: Sequence[Chat], tokenizer: "PreTrainedTokenizerBase", stop_tokens: frozenset[int], where: Sequence[str]
) -> list[Marked]:
    """The tokens of each conversation; those that hold a character of a span are trained.

    Args:
        chats: Conversations as text. The template has written all special tokens.
        tokenizer: One with a fast backend, which knows the characters of each token.
        stop_tokens: Tokens that end a turn; the last of each span, blanks aside, must be one.
        where: The place of each conversation.

    Raises:
        BadInput: the tokenizer is a slow one, or an assistant turn does not end with a stop token.
    """
    if not tokenizer.is_fast:
        raise BadInput(
            f"{type(tokenizer).__name__} has no fast backend, which tells the characters of each token; "
            "save a tokenizer.json beside the model (transformers does when it can convert the tokenizer)"
        )
    sequences = []
    for start in range(0, len(chats), BATCH):
        batch = chats[start : start + BATCH]
        texts = [chat.text for chat in batch]
        out = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for number, (chat, tokens, offsets) in enumerate(
            zip(batch, out["input_ids"], out["offset_mapping"], strict=True), start
        ):
            spans = [_tokens_of(span, offsets) for span in chat.spans]
            _check_ends(tokens, spans, tokenizer, stop_tokens, where[number])
            trained = {position for span in spans for position in span}
            sequences.append(marked(tokens, [position in trained for position in range(len(tokens))]))
    return sequences


def stop_tokens_of(tokenizer: "PreTrainedTokenizerBase", more: Iterable[int] = ()) -> frozenset[int]:
    """The end-of-sequence token, the tokens that a vocabulary was given on purpose (<|im_end|>), and `more`."""
    backend: Any = tokenizer  # whose class, a parent of all, does not declare what all have
    end = [] if backend.eos_token_id is None else [backend.eos_token_id]
    return frozenset([*end, *backend.get_added_vocab().values(), *more])


def says_nothing(sequence: Marked, tokenizer: "PreTrainedTokenizerBase", stop_tokens: frozenset[int]) -> bool:
    """Whether only ends of turns and blanks are trained: a template may leave out content that it cannot read."""
    said = {label for label in sequence.labels if label != UNTRAINED and label not in stop_tokens}
    return not any(_is_seen(token, tokenizer) for token in said)


def _tokens_of(span: Span, offsets: Sequence[Span]) -> list[int]:
    """Positions of the tokens that hold a character of the span; a token without characters belongs where it begins."""
    start, end = span
    return [
        position for position, (left, right) in enumerate(offsets) if left < end and (right > start or left >= start)
    ]


def _check_ends(
    tokens: list[int],
    spans: list[list[int]],
    tokenizer: "PreTrainedTokenizerBase",
    stop_tokens: frozenset[int],
    where: str,
) -> None:
    for span in spans:
        last = next(
            (tokens[at] for at in reversed(span) if tokens[at] in stop_tokens or _is_seen(tokens[at], tokenizer)), None
        )
        if last is not None and last not in stop_tokens:
            raise BadInput(
                f"the chat template drops the end of a turn: what the assistant says in {where} ends with "
                f"{tokenizer.decode([last])!r}, which is no end-of-sequence token: the model would not learn to stop. "
                "Write {{ eos_token }} behind the assistant's content in the template, or make the mark that "
                "stands there a special token of the tokenizer"
            )


def _is_seen(token: int, tokenizer: "PreTrainedTokenizerBase") -> bool:
    return bool(str(tokenizer.decode([token])).strip())
