"""Which tokens are trained: from the assistant's characters, with a check of end-of-turn tokens, and a preview."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.text import Text

from qsvd.data.chat import Chat, chat_template, render_marked
from qsvd.data.columns import UNTRAINED, Marked, Tokenized
from qsvd.data.plain import BATCH
from qsvd.errors import BadInput, visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def mark_chats(
    chats: Sequence[Chat], tokenizer: "PreTrainedTokenizerBase", stop_tokens: frozenset[int], where: Sequence[str]
) -> list[Marked]:
    """Return the tokens of each conversation; tokens with a character in a span are trained.

    Args:
        chats: Conversations as text, special tokens included.
        tokenizer: One with a fast backend, which knows the characters of each token.
        stop_tokens: Tokens that end a turn. The last token of each span, except blanks, must be one of them.
        where: The place of each conversation, for messages.

    Raises:
        BadInput: the tokenizer has no fast backend, or an assistant turn does not end with a stop token.
    """
    if not tokenizer.is_fast:
        raise BadInput(
            f"{type(tokenizer).__name__} has no fast backend, which is needed to find the characters of each token; "
            "save a tokenizer.json next to the model (transformers writes one if it can convert the tokenizer)"
        )
    sequences = []
    for start in range(0, len(chats), BATCH):
        batch = chats[start : start + BATCH]
        texts = [chat.text for chat in batch]
        out = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for number, (chat, tokens, offsets) in enumerate(
            zip(batch, out["input_ids"], out["offset_mapping"], strict=True), start
        ):
            labels = [UNTRAINED] * len(tokens)
            for begin, end in chat.spans:
                # A token without characters (right == left) belongs to the span in which it starts.
                inside = [
                    at for at, (left, right) in enumerate(offsets) if left < end and (right > begin or left >= begin)
                ]
                check_end([tokens[at] for at in inside], tokenizer, stop_tokens, where[number])
                for at in inside:
                    labels[at] = tokens[at]
            sequences.append(Marked(tokens, labels))
    return sequences


def stop_tokens_of(tokenizer: "PreTrainedTokenizerBase", more: Iterable[int] = ()) -> frozenset[int]:
    """Return the end-of-sequence token, the tokens that were added to the vocabulary (<|im_end|>), and `more`."""
    backend: Any = tokenizer  # its base class does not declare get_added_vocab
    end = [] if backend.eos_token_id is None else [backend.eos_token_id]
    return frozenset([*end, *backend.get_added_vocab().values(), *more])


def ends_of_turn(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the token that ends the assistant's turn by the chat template; none if it cannot be told."""
    template, stop_tokens = chat_template(tokenizer), stop_tokens_of(tokenizer)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    if template is None:
        return []
    try:
        (sequence,) = mark_chats([render_marked(template, messages, None, 0)], tokenizer, stop_tokens, ["a test"])
    except BadInput:
        return []
    return [label for label in reversed(sequence.labels) if label in stop_tokens][:1]


def says_nothing(sequence: Marked, tokenizer: "PreTrainedTokenizerBase", stop_tokens: frozenset[int]) -> bool:
    """Return whether only stop tokens and blanks are trained: a template may drop content that it cannot read."""
    said = {label for label in sequence.labels if label != UNTRAINED and label not in stop_tokens}
    return not any(_is_visible(token, tokenizer) for token in said)


def check_end(
    tokens: Sequence[int], tokenizer: "PreTrainedTokenizerBase", stop_tokens: frozenset[int], where: str
) -> None:
    """Refuse a turn whose last token, except blanks, is not a stop token."""
    last = next((token for token in reversed(tokens) if token in stop_tokens or _is_visible(token, tokenizer)), None)
    if last is not None and last not in stop_tokens:
        raise BadInput(
            f"the chat template drops the end of a turn: the assistant's text in {where} ends with "
            f"{tokenizer.decode([last])!r}, which is not an end-of-sequence token, so the model would not learn to "
            "stop. Write {{ eos_token }} after the assistant's content in the template, or make the mark there a "
            "special token of the tokenizer"
        )


def _is_visible(token: int, tokenizer: "PreTrainedTokenizerBase") -> bool:
    return bool(str(tokenizer.decode([token])).strip())


TRAINED = "bold green"
OPEN, CLOSE = "[[", "]]"  # visible on a terminal without colours
LONGEST_RUN = 3  # marks of an image or a sound that are shown one by one


def preview(tokenized: Tokenized, tokenizer: "PreTrainedTokenizerBase", index: int = 0) -> Text:
    """Return a line with the place of the example and the share of trained tokens, then the decoded example.

    Trained tokens are in [[ ]] and coloured. A long run of a special token is one mark and a count. For labelled
    text the first line names the class.

    Raises:
        BadInput: index is outside the sequences.
    """
    count = len(tokenized.input_ids)
    if not 0 <= index < count:
        raise BadInput(f"example {index} is outside 0..{count - 1}, the sequences of {tokenized.places.source}")
    tokens, label = tokenized.input_ids[index], tokenized.labels[index]
    if isinstance(label, int):
        head = f"{tokenized.where(index)}: {len(tokens)} tokens, label {label} ({tokenized.label_names[label]})"
        return Text(visible(f"{head}\n{_decode(tokens, tokenizer)}"))
    trained = [one != UNTRAINED for one in label]
    share = sum(trained) / len(tokens)
    text = Text(f"{tokenized.where(index)}: {len(tokens)} tokens, {sum(trained)} trained ({share:.0%})\n")
    for piece, is_trained in ((visible(piece), one) for piece, one in _pieces(tokens, trained, tokenizer)):
        text.append(f"{OPEN}{piece}{CLOSE}" if is_trained else piece, style=TRAINED if is_trained else None)
    return text


def _pieces(tokens: list[int], trained: list[bool], tokenizer: "PreTrainedTokenizerBase") -> Iterator[tuple[str, bool]]:
    """Yield runs of trained or untrained tokens as text; a token that is decoded alone may lose its space."""
    end, before = 0, ""
    for is_trained, run in groupby(trained):
        begin, end = end, end + len(list(run))
        text = _decode(tokens[:end], tokenizer)
        yield _counted(text[len(before) :], tokens[begin:end], tokenizer), is_trained
        before = text


def _counted(text: str, tokens: list[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a text in which one mark with a count stands for a run of it, such as the tokens of an image."""
    backend: Any = tokenizer  # its base class does not declare get_added_vocab
    special = {*backend.get_added_vocab().values()}
    long = {token for token, run in groupby(tokens) if token in special and len(list(run)) > LONGEST_RUN}
    for mark in sorted(_decode([token], tokenizer).strip() for token in long):
        runs = rf"{re.escape(mark)}(?:\s*{re.escape(mark)}){{{LONGEST_RUN},}}"
        text = re.sub(runs, lambda run, mark=mark: f"{mark} x {run.group().count(mark)}", text)
    return text


def _decode(tokens: list[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))


# Which share of the tokens of a data set is trained.


@dataclass
class Share:
    """What the blocks of large data have together: sequences, their tokens and trained tokens, and the shortest one."""

    sequences: int = 0
    total: int = 0
    trained: int = 0
    shortest: int = 2**62

    def add(self, sequences: Sequence[Marked]) -> None:
        """Count more sequences, as they are before they are cut."""
        self.sequences += len(sequences)
        self.total += sum(len(sequence.input_ids) for sequence in sequences)
        self.trained += sum(label >= 0 for sequence in sequences for label in sequence.labels)
        self.shortest = min([self.shortest, *(len(sequence.input_ids) for sequence in sequences)])


def check_share(sequences: Sequence[Marked], source: str) -> None:
    """Refuse data in which no token or every token is trained: usually the chat template does not fit."""
    share = Share()
    share.add(sequences)
    check_marked(share.trained, share.total, source)


def check_left(share: Share, dropped: int, max_length: int, source: str) -> None:
    """Refuse data of which no example has a trained token after cutting."""
    if share.sequences and share.sequences == dropped:
        raise BadInput(
            f"{source}: no example has a trained token within max_length {max_length}; "
            f"the shortest has {share.shortest} tokens; raise --max-length"
        )


def check_marked(trained: int, total: int, source: str) -> None:
    """Refuse data in which no token or every token is trained."""
    if trained in (0, total):
        raise BadInput(
            f"{source}: {trained} of {total} tokens would be trained ({'100' if trained else '0'} %), so answers "
            "cannot be told from the rest; check where the chat template has {% generation %}, and whether prompts are "
            "empty, or train on all tokens (--loss-on all)"
        )
