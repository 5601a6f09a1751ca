"""Examples with images -> token ids and labels, by the model's own processor and TRL's collator.

Every image is read twice: once here, to check it and to count the tokens that the processor makes of it, and once for
each batch in training, since pixel values are too large to keep.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from qsvd.data.chat import MARK, Message, speaks
from qsvd.data.columns import UNTRAINED, Examples, Marked, Row, Tokenized
from qsvd.data.masks import check_end, check_share, says_nothing, stop_tokens_of
from qsvd.data.media import NO_PILLOW, MediaRows
from qsvd.data.plain import start_tokens
from qsvd.data.row_files import refusal
from qsvd.data.template_names import RAISED, check_length
from qsvd.data.tokens import SEPARATOR, conversation, has_messages, refuse_untrained
from qsvd.errors import BadInput, first_line
from qsvd.files.quantized.padding import config_of, set_padding
from qsvd.inputs.model_files import from_folder, processor_of

if TYPE_CHECKING:
    from transformers import ProcessorMixin


def reads_images(architecture: str) -> bool:
    """Return whether a class of transformers reads images beside text."""
    import transformers

    from qsvd.plan.language import modalities

    found = getattr(transformers, architecture, None)
    return found is not None and {"text", "image"} <= {*modalities(found)}


def hears(architecture: str) -> bool:
    """Return whether a class of transformers writes what it hears, as Whisper does."""
    import transformers

    found: Any = getattr(transformers, architecture, None)
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return is_model and found.main_input_name == "input_features" and found.can_generate()


def reads_sounds(architecture: str) -> bool:
    """Return whether a class of transformers reads text and sounds, and writes text."""
    import transformers

    from qsvd.plan.language import modalities

    found: Any = getattr(transformers, architecture, None)
    return found is not None and found.main_input_name == "input_ids" and {"text", "audio"} <= {*modalities(found)}


def open_processor(folder: Path, chat_template: str | None = None, *, of: Literal["images", "sound"] = "images") -> Any:
    """Open the processor of a model's folder and give it a padding token.

    Args:
        chat_template: Replaces that of the processor.
        of: What it reads beside text.

    Raises:
        BadInput: the folder has none, or a library is missing that it needs.
    """
    from transformers import AutoProcessor, ProcessorMixin
    from transformers.utils import is_vision_available

    if of == "images" and not is_vision_available():
        raise BadInput(NO_PILLOW)
    part = processor_of(of)
    processor = from_folder(AutoProcessor, folder, part)
    if not isinstance(processor, ProcessorMixin):
        raise BadInput(f"{folder} has no {part.name} that transformers can open; {part.advice}")
    tokenizer: Any = processor.tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    if chat_template is not None:
        processor.chat_template = tokenizer.chat_template = chat_template
    set_padding(tokenizer, config_of(folder))
    return processor


def tokenize_images(
    examples: Examples,
    processor: "ProcessorMixin",
    *,
    max_length: int,
    loss_on: Literal["answers", "all"] = "answers",
    stop_ids: Sequence[int] = (),
) -> Tokenized:
    """Return the token ids of all examples, image tokens included, and for each token whether it is trained.

    An example longer than max_length is left out whole and counted, since images cannot be cut.

    Args:
        examples: Chats or pairs; those without images stay as texts.
        stop_ids: More tokens that end a turn.

    Raises:
        BadInput: an image cannot be opened, the processor refuses an example, its text has another number of places for
            images, or it has no trained token (all are counted, the first few are shown); an assistant turn has no end;
            nothing is short enough.
    """
    rows, collate = _rows_for_trl(examples, processor, loss_on)
    data = MediaRows(rows, Path(examples.places.source).parent, processor, collate)
    sequences, data = _processed(examples, data, processor)
    if loss_on == "answers":
        stops = stop_tokens_of(processor.tokenizer, stop_ids)  # pyright: ignore[reportAttributeAccessIssue]
        _check_answers(examples, sequences, processor, stops)
    kept = [index for index, sequence in enumerate(sequences) if len(sequence.input_ids) <= max_length]
    lengths = [len(sequence.input_ids) for sequence in sequences]
    if not kept:
        raise BadInput(
            f"{examples.places.source}: no example has at most {max_length} tokens, images included; the shortest has "
            f"{min(lengths)} tokens; raise --max-length"
        )
    left_out = len(sequences) - len(kept)
    return Tokenized(
        examples.kind,
        [sequences[index].input_ids for index in kept],
        [sequences[index].labels for index in kept],
        examples.places.take(kept),
        truncated=left_out,
        dropped=left_out,
        cut_tokens=sum(lengths) - sum(lengths[index] for index in kept),
        columns=examples.columns,
        has_template=not isinstance(rows[0].get("prompt"), str),
        media=data.take(kept),
    )


def _rows_for_trl(examples: Examples, processor: Any, loss_on: str) -> tuple[list[Row], Callable[[list[Row]], Any]]:
    """Return the examples as TRL has them, and its collator.

    The assistant's text is trained in the first of three ways that is possible: where the chat template marks it, where
    TRL's copy of the template does, or as the completion of all before it, if it is the last message.
    """
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    if wrong := [examples.places.short(n) for n, row in enumerate(examples.rows) if row.get("tools")]:
        raise BadInput(refusal(examples.places.source, "example", [(where, "tools beside images") for where in wrong]))
    collator = partial(DataCollatorForVisionLanguageModeling, processor)
    is_chat, is_literal = has_messages(examples), examples.literal or processor.chat_template is None
    if not is_chat and is_literal:
        return _literal(examples, processor), collator(completion_only_loss=loss_on == "answers")
    if processor.chat_template is None:
        raise BadInput(
            f"{examples.places.source} holds messages, but the processor has no chat template: give --chat-template "
            "FILE, or use a chat model"
        )
    if examples.kind == "chat":
        rows = [{"images": row.get("images", []), "messages": row["messages"]} for row in examples.rows]
        if loss_on == "all":
            return rows, collator()
        template = processor.chat_template if MARK.search(processor.chat_template) else _template_of_trl(processor)
        if template is not None:
            return rows, collator(assistant_only_loss=True, chat_template=template)
    return _divided(examples), collator(completion_only_loss=loss_on == "answers")


def _literal(examples: Examples, processor: Any) -> list[Row]:
    """Return pairs of strings that start and end with the tokens that texts have: TRL adds none."""
    start, end = processor.tokenizer.decode(start_tokens(processor.tokenizer)), processor.tokenizer.eos_token
    if end is None:
        raise BadInput("the tokenizer has no end-of-sequence token, so the model could not learn where an answer ends")
    separator = "" if examples.literal else SEPARATOR
    return [
        {
            "images": row.get("images", []),
            "prompt": start + row["prompt"].removeprefix(start) + separator,
            "completion": row["completion"].removesuffix(end) + end,
        }
        for row in examples.rows
    ]


def _divided(examples: Examples) -> list[Row]:
    """Return conversations as prompt and completion; refuse those in which the assistant speaks before the end."""
    rows, problems = [], []
    for index, row in enumerate(examples.rows):
        messages, first = conversation(row)
        first = first or len(messages) - 1
        if examples.kind == "chat" and (speaks(messages[:first]) or not speaks(messages[first:])):
            problems.append((examples.places.short(index), "the assistant speaks not only at the end"))
        rows.append({"images": row.get("images", []), "prompt": messages[:first], "completion": messages[first:]})
    if problems:
        what = refusal(examples.places.source, "unusable example", problems)
        raise BadInput(f"{what}; mark the assistant's text in the chat template with {{% generation %}}")
    return rows


def _template_of_trl(processor: Any) -> str | None:
    import jinja2
    from trl.chat_template_utils import get_training_chat_template

    try:
        return get_training_chat_template(processor)
    except (*RAISED, jinja2.TemplateError):
        return None


def _processed(examples: Examples, data: MediaRows, processor: Any) -> tuple[list[Marked], MediaRows]:
    """Return tokens and labels of each row, and the rows with the digests of their images."""
    sequences = []

    def read(index: int) -> dict[str, Tensor]:
        row = data[index]
        _check_places(_text_of(row, processor), len(row["images"]), processor)
        batch = dict(data.collate([row]))
        sequences.append(Marked(batch["input_ids"][0].tolist(), batch["labels"][0].tolist()))
        return batch

    return sequences, digested(examples, data, read)


def digested(examples: Examples, data: MediaRows, read: Callable[[int], dict[str, Tensor]]) -> MediaRows:
    """Read every row once; return the rows with the digests of what a processor makes of their images or sounds.

    Raises:
        BadInput: rows cannot be read (all are counted, the first few are shown).
    """
    import jinja2

    digests, problems, numbers = [], [], 0
    for index in range(len(data)):
        try:
            batch = read(index)
        except (*RAISED, jinja2.TemplateError) as error:
            problems.append((examples.places.short(index), first_line(error)))
            continue
        digest, seen = hashlib.sha256(), [value for value in batch.values() if value.is_floating_point()]
        for value in seen:
            digest.update(value.to(torch.float32).numpy().tobytes())
        digests.append(digest.hexdigest())
        numbers = max(numbers, sum(value.numel() for value in seen))
    if problems:
        raise BadInput(refusal(examples.places.source, "unusable example", problems))
    return replace(data, digests=digests, pixels=numbers)


def _text_of(row: Row, processor: Any) -> str:
    """Return a row with open images as text, with one mark for each image."""
    if isinstance(row.get("prompt"), str):
        return row["prompt"] + row["completion"]
    return _rendered(row.get("messages") or [*row["prompt"], *row["completion"]], row["images"], processor)


def _rendered(
    messages: list[Message], images: Sequence[Any], processor: Any, *, sounds: int = 0, begin: bool = False
) -> str:
    """Return a conversation as text; images and sounds without a place come before the first text of the user."""
    from trl.data_utils import prepare_multimodal_messages

    shown = prepare_multimodal_messages(messages, [*images])
    if sounds:
        first = next(number for number, message in enumerate(shown) if message["role"] == "user")
        heard = [{"type": "audio", "audio": "there"}] * sounds  # templates look for the type or the key
        shown[first] = shown[first] | {"content": [*heard, *shown[first]["content"]]}
    text = processor.apply_chat_template(shown, tokenize=False, add_generation_prompt=begin)
    check_length(text)
    return text


def _check_places(text: str, there: int, processor: Any, of: Literal["image", "audio"] = "image") -> None:
    """Refuse a text with another number of places than of images or sounds, of which a processor may say nothing."""
    mark, what = getattr(processor, f"{of}_token", None), {"image": "images", "audio": "sounds"}[of]
    if mark is not None and text.count(mark) != there:
        raise BadInput(f"its text has {text.count(mark)} places for {what} ({mark}), and there are {there} {what}")


def read_question(
    processor: Any, messages: list[Message], images: Sequence[Any], sounds: Sequence[Any] = (), *, raw: bool
) -> dict[str, Tensor]:
    """Return what a model reads before its answer to the last message, as it does in training.

    Args:
        images: Open ones, which belong to the first message of the user.
        sounds: The same, with the samples a second that the processor takes.
        raw: Whether the last message is a text as it is, with its own marks; else the chat template renders them all.

    Raises:
        BadInput: the text has another number of places for images, or the processor refuses it.
    """
    import jinja2

    try:
        if raw:
            text = processor.tokenizer.decode(start_tokens(processor.tokenizer)) + messages[-1]["content"]
        else:
            text = _rendered(messages, images, processor, sounds=len(sounds), begin=True)
        _check_places(text, len(images), processor)
        _check_places(text, len(sounds), processor, "audio")
        given: dict[str, Any] = {"images": [*images]} if images else {}
        if sounds:
            given |= {"audio": [*sounds], "sampling_rate": processor.feature_extractor.sampling_rate}
        return dict(processor(text=[text], return_tensors="pt", add_special_tokens=False, **given))
    except (*RAISED, jinja2.TemplateError) as error:
        flag = "--audio" if sounds else "--image"
        raise BadInput(f"{flag}: the processor cannot read the prompt: {first_line(error)}") from error


def _check_answers(
    examples: Examples, sequences: Sequence[Marked], processor: Any, stop_tokens: frozenset[int]
) -> None:
    """Refuse what is refused of texts: nothing to learn, or a turn without an end."""
    tokenizer = processor.tokenizer
    refuse_untrained(examples.places, [not one.num_trained for one in sequences], "the assistant says nothing")
    lost = [says_nothing(sequence, tokenizer, stop_tokens) for sequence in sequences]
    refuse_untrained(examples.places, lost, "the chat template leaves out what the assistant says")
    for index, sequence in enumerate(sequences):
        for is_trained, run in groupby(sequence.labels, key=lambda label: label != UNTRAINED):
            if is_trained:
                check_end(list(run), tokenizer, stop_tokens, examples.where(index))
    check_share(sequences, examples.places.source)
