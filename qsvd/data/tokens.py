"""Examples -> token ids, and for each token whether it is trained; short sequences -> rows that they share."""

from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qsvd.data import chat, plain
from qsvd.data.chat import Chat, ChatTemplate
from qsvd.data.columns import UNTRAINED, Examples, Marked, Tokenized
from qsvd.data.masks import Share, check_left, check_marked, mark_chats, says_nothing, stop_tokens_of
from qsvd.data.plain import tokenize_labelled
from qsvd.data.row_files import Places, Problem, refusal
from qsvd.errors import BadInput, listing
from qsvd.files.source import read_config
from qsvd.plan.language import why_mixed

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

SEPARATOR = "\n"  # between question and answer, without a chat template


def tokenize(
    examples: Examples,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    loss_on: Literal["answers", "all"] = "answers",
    stop_ids: Sequence[int] = (),
    label_names: Sequence[str] | None = None,
) -> Tokenized:
    """Return the token ids of all examples, and for each token whether it is trained.

    chat: every assistant turn is trained with its end-of-turn token (chat.py).
    pair: the completion and the end-of-sequence token are trained. The chat template, if there is one, is applied to
        questions and instructions, not to literal prompts.
    text: all tokens are trained, in windows.
    labelled: the class is trained (plain.py).

    Chats and pairs are cut at max_length; one without a trained token left is dropped and counted.

    Args:
        examples: From `recognise`.
        tokenizer: The tokenizer of the model.
        max_length: Tokens of a sequence, 2 or more.
        loss_on: "answers", or "all" tokens of a chat or pair.
        stop_ids: More tokens that end a turn (generation_config.eos_token_id of the model).
        label_names: For labelled text, the classes of the training rows; None finds them.

    Raises:
        BadInput: examples have no trained token, or the chat template cannot render them (all are counted, the first
            few are shown); the template drops the end of a turn; with loss_on "answers" no token or every token of
            chats or pairs is trained; nothing is left after cutting; there are messages but no chat template.
    """
    if max_length < 2:
        raise BadInput(f"max_length {max_length} is below 2: one token predicts the next")
    if loss_on not in ("answers", "all"):
        raise BadInput(f"loss_on {loss_on!r} is neither answers nor all")
    if examples.has_images:
        raise BadInput(f"{examples.places.source} has images, and only texts can be used here: remove them")
    if examples.kind == "labelled":
        return tokenize_labelled(examples, tokenizer, max_length, label_names)
    return tokenize_part(examples, tokenizer, None, max_length=max_length, loss_on=loss_on, stop_ids=stop_ids)


def tokenize_part(
    examples: Examples,
    tokenizer: "PreTrainedTokenizerBase",
    share: Share | None,
    *,
    max_length: int,
    loss_on: str = "answers",
    stop_ids: Sequence[int] = (),
) -> Tokenized:
    """Tokenize texts, pairs or chats as `tokenize` does.

    Args:
        share: Counts what `check_marked` and `check_left` look at in all blocks together; None for the whole data,
            which are checked at once.
    """
    if examples.kind == "text":
        return _tokenize_text(examples, tokenizer, max_length)
    sequences, source = _mark_answers(examples, tokenizer, loss_on, stop_ids), examples.places.source
    counted = Share() if share is None else share
    counted.add(sequences)
    if share is None and loss_on == "answers":
        check_marked(counted.trained, counted.total, source)
    data = _cut(examples, sequences, max_length)
    if share is None:
        check_left(counted, data.dropped, max_length, source)
    is_literal = examples.literal or chat.chat_template(tokenizer) is None
    return replace(data, has_template=has_messages(examples) or not is_literal)


def question_prompts(questions: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Return the tokens of each question as they are before its answer in training."""
    template = chat.chat_template(tokenizer)
    if template is None:
        return plain.prompts([question + SEPARATOR for question in questions], tokenizer)
    asked = [[{"role": "user", "content": question}] for question in questions]
    return plain.encode([chat.render(template, messages, begin=True) for messages in asked], tokenizer)


def _mark_answers(
    examples: Examples, tokenizer: "PreTrainedTokenizerBase", loss_on: str, stop_ids: Sequence[int]
) -> list[Marked]:
    template = chat.chat_template(tokenizer)
    if not has_messages(examples) and (examples.literal or template is None):
        return _mark_pairs(examples, tokenizer, loss_on)
    if template is None:
        raise BadInput(
            f"{examples.places.source} holds messages, but the tokenizer has no chat template: give qsvd train "
            "--chat-template NAME (zephyr goes with any tokenizer), or use a chat model"
        )
    return _mark_chats(examples, template, loss_on, stop_tokens_of(tokenizer, stop_ids))


def has_messages(examples: Examples) -> bool:
    """Return whether examples are conversations, which need a chat template."""
    return examples.kind == "chat" or any(isinstance(row["prompt"], list) for row in examples.rows)


def _tokenize_text(examples: Examples, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> Tokenized:
    texts = [row["text"] for row in examples.rows]
    windows = plain.documents(texts, tokenizer, max_length)
    blank = [
        not (text.strip() and sum(window.num_trained for window in of)) for text, of in zip(texts, windows, strict=True)
    ]
    refuse_untrained(examples.places, blank, "no text")
    kept = [(index, window) for index, of in enumerate(windows) for window in of]
    return _collect(examples, kept)


def _mark_pairs(examples: Examples, tokenizer: "PreTrainedTokenizerBase", loss_on: str) -> list[Marked]:
    rows, separator = examples.rows, "" if examples.literal else SEPARATOR
    if loss_on == "answers":
        refuse_untrained(examples.places, [not row["completion"].strip() for row in rows], "the answer is empty")
    sequences = plain.pairs([row["prompt"] + separator for row in rows], [row["completion"] for row in rows], tokenizer)
    return sequences if loss_on == "answers" else [_all_trained(sequence) for sequence in sequences]


def _mark_chats(examples: Examples, template: ChatTemplate, loss_on: str, stop_tokens: frozenset[int]) -> list[Marked]:
    conversations = [conversation(row) for row in examples.rows]
    if loss_on == "answers":
        silent = [not chat.speaks(messages[first:]) for messages, first in conversations]
        refuse_untrained(examples.places, silent, "the assistant says nothing")
    chats, problems = [], []
    for index, (messages, first) in enumerate(conversations):
        try:
            tools = examples.rows[index].get("tools")
            if loss_on == "answers":
                chats.append(chat.render_marked(template, messages, tools, first))
            else:
                text = chat.render(template, messages, tools)
                # One span over all, so that the end of the assistant's last turn is checked.
                chats.append(Chat(text, [(0, len(text))] if messages[-1]["role"] == "assistant" else []))
        except ValueError as error:
            problems.append((examples.places.short(index), str(error)))
    if problems:
        raise BadInput(refusal(examples.places.source, "unusable example", problems))
    where = [examples.where(index) for index in range(len(chats))]
    sequences = mark_chats(chats, template.tokenizer, stop_tokens, where)
    if loss_on == "all":
        return [_all_trained(sequence) for sequence in sequences]
    lost = [says_nothing(sequence, template.tokenizer, stop_tokens) for sequence in sequences]
    refuse_untrained(examples.places, lost, "the chat template leaves out what the assistant says")
    return sequences


def conversation(row: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """Return the messages of a row, and the index of the first that may be trained."""
    if "messages" in row:
        return row["messages"], 0
    if isinstance(row["prompt"], list):
        return row["prompt"] + row["completion"], len(row["prompt"])
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}], 1


def _all_trained(sequence: Marked) -> Marked:
    return Marked(sequence.input_ids, list(sequence.input_ids))


def refuse_untrained(places: Places, untrained: Sequence[bool], reason: str) -> None:
    """Refuse examples without a trained token, by BadInput."""
    problems: list[Problem] = [
        (places.short(index), f"no trained token: {reason}") for index, is_so in enumerate(untrained) if is_so
    ]
    if problems:
        raise BadInput(refusal(places.source, "untrained example", problems))


def _cut(examples: Examples, sequences: Sequence[Marked], max_length: int) -> Tokenized:
    kept, truncated, cut_tokens, untrained = [], 0, 0, []
    for index, sequence in enumerate(sequences):
        short = Marked(sequence.input_ids[:max_length], sequence.labels[:max_length])
        truncated += len(short.input_ids) < len(sequence.input_ids)
        cut_tokens += len(sequence.input_ids) - len(short.input_ids)
        untrained.append(sequence.num_trained == 0)
        if short.num_trained:
            kept.append((index, short))
    refuse_untrained(examples.places, untrained, "the chat template marks nothing")
    data = _collect(examples, kept)
    return replace(data, truncated=truncated, dropped=len(sequences) - len(kept), cut_tokens=cut_tokens)


def _collect(examples: Examples, kept: Sequence[tuple[int, Marked]]) -> Tokenized:
    return Tokenized(
        examples.kind,
        [sequence.input_ids for _, sequence in kept],
        [sequence.labels for _, sequence in kept],
        examples.places.take([index for index, _ in kept]),
        columns=examples.columns,
    )


def check_vocabulary(read: Sequence[Tokenized], tokenizer: "PreTrainedTokenizerBase", folder: Path, name: str) -> None:
    """Refuse tokens outside the vocabulary of a model: on a GPU they would end the process.

    Args:
        tokenizer: Its padding token must be inside, too.
        folder: With config.json.
        name: Of the model, for the sentence.

    Raises:
        BadInput: the sentence names the tokens and the first example that has each.
    """
    size = read_config(folder).get_text_config().vocab_size
    places: dict[int, str] = {}
    for data in read:
        for index, tokens in enumerate(data.input_ids):
            for token in {*tokens} - places.keys():
                if not 0 <= token < size:
                    places[token] = data.where(index)
    padding: Any = tokenizer.pad_token_id
    if padding is not None and not 0 <= padding < size:
        places.setdefault(padding, "padding")
    if places:
        wrong = [f"{token} ({tokenizer.convert_ids_to_tokens(token)}, {places[token]})" for token in sorted(places)]
        raise BadInput(
            f"{len(wrong)} tokens are outside 0..{size - 1}, the vocabulary of {name}: {listing(wrong)}; put the "
            "model's own tokenizer into its folder, or give the 16-bit model rows for these tokens "
            "(resize_token_embeddings) and quantize it again"
        )


# Packing: short sequences share a row. Each has positions of its own, from 0, by which transformers tells them apart.


def check_keeps_apart(folder: Path, name: str) -> None:
    """Refuse to pack for a model that mixes the sequences of a row."""
    if reason := why_mixed(read_config(folder)):
        raise BadInput(f"--packing cannot be used for {name}: {reason}; leave it out")


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Return which sequences share a row: best fit decreasing, so that each goes into the fullest row that holds it.

    Args:
        lengths: Of the sequences, at most `row_length`.
    """
    rows: list[list[int]] = []
    spaces: list[int] = []  # of rows that are not full, ascending
    with_space: dict[int, deque[list[int]]] = defaultdict(deque)
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fit, row, space = bisect_left(spaces, lengths[index]), [], row_length
        if fit == len(spaces):
            rows.append(row)
        else:
            space = spaces[fit]
            row = with_space[space].popleft()
            if not with_space[space]:
                del spaces[fit]
        row.append(index)
        space -= lengths[index]
        if space and not with_space[space]:
            insort(spaces, space)
        with_space[space].append(row)
    return rows


def packed_dataset(data: Tokenized, rows: Sequence[Sequence[int]]) -> "Dataset":
    """Return a data set of packed rows, with the columns input_ids, labels and position_ids.

    The first token of a sequence has no loss: it is not predicted from the sequence before it.
    """
    from datasets import Dataset

    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
    for row in rows:
        lengths = [len(data.input_ids[index]) for index in row]
        columns["input_ids"].append([token for index in row for token in data.input_ids[index]])
        columns["labels"].append([one for index in row for one in (UNTRAINED, *_labels(data, index)[1:])])
        columns["position_ids"].append([position for length in lengths for position in range(length)])
    return Dataset.from_dict(columns)


def _labels(data: Tokenized, index: int) -> list[int]:
    labels = data.labels[index]
    assert not isinstance(labels, int), "labelled texts are refused"
    return labels


def packed_batch(rows: Sequence[Mapping[str, list[int]]], padding: int) -> dict[str, Tensor]:
    """Return the tensors of rows of `packed_dataset`, padded on the right.

    There is no attention mask, by which transformers would read a row as one sequence. Padding has position 0, so that
    each token of it is a sequence of its own.

    Args:
        padding: The token to pad with.
    """
    fillers = {"input_ids": padding, "labels": UNTRAINED, "position_ids": 0}
    return {
        name: pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=filler)
        for name, filler in fillers.items()
    }


def count_packed(position_ids: Tensor) -> int:
    """Return the tokens of packed rows [batch, tokens] without padding: a position 0 that no position 1 follows."""
    following = torch.nn.functional.pad(position_ids[:, 1:], (0, 1))
    return int(((position_ids > 0) | (following == 1)).sum())
