"""The data of a run: rows to tokens, and what is held out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qsvd.data import encoder_decoder
from qsvd.data.columns import Examples, Tokenized, recognise
from qsvd.data.images import hears, open_processor, reads_images, tokenize_images
from qsvd.data.large.cache import Recipe, open_large
from qsvd.data.read import read_train
from qsvd.data.template_names import check_tokens, read_template
from qsvd.data.tokens import check_keeps_apart, check_vocabulary, pack, packed_dataset, tokenize
from qsvd.errors import BadInput
from qsvd.files.atomic import read_object
from qsvd.files.quantized.padding import config_of, set_padding
from qsvd.files.source import read_config
from qsvd.inputs.model_files import GENERATION, TOKENIZER, check_ids, damaged_file, from_folder
from qsvd.options import Train
from qsvd.plan.weights import context_length, writers
from qsvd.report.errors import short_count

MOST_LENGTH = 1024  # tokens of a sequence, unless more are asked for
LEAST_HELD_OUT, MOST_HELD_OUT = 8, 256  # examples, where no validation data are given


@dataclass(frozen=True)
class Home:
    """A 16-bit or quantized model: its name as it was given, its folder with tokenizer and config.json, its class."""

    name: str
    folder: Path
    architecture: str


@dataclass(frozen=True)
class RunData:
    """The data of a run as tokens.

    Args:
        held_out: None if nothing is held out.
        max_length: The longest sequence that is allowed, in tokens.
        is_encoder_decoder: Whether prompts are read by an encoder and completions are written by a decoder.
        packed: With packing, the examples to train that share each row, by number.
    """

    tokenizer: Any
    train: Tokenized
    held_out: Tokenized | None
    max_length: int
    is_encoder_decoder: bool = False
    packed: list[list[int]] | None = None

    @property
    def lengths(self) -> list[int]:
        """The tokens of each row that is trained: of each example, or of those that share a row."""
        found = [len(tokens) for tokens in self.train.input_ids]
        return found if self.packed is None else [sum(found[index] for index in row) for row in self.packed]

    @property
    def dataset(self) -> Any:
        """The examples to train: a datasets.Dataset of input_ids and labels, packed rows, or MediaRows."""
        if self.packed is not None:
            return packed_dataset(self.train, self.packed)
        if self.train.media is not None:
            return self.train.media
        if self.is_encoder_decoder:
            return encoder_decoder.as_dataset(self.train, self.tokenizer)
        return self.train.as_dataset()


def open_tokenizer(folder: Path, chat_template: str | None = None) -> Any:
    """Open the tokenizer of a model's folder, with the padding token of the model; a BadInput where it cannot be.

    Args:
        chat_template: Replaces that of the tokenizer.
    """
    from transformers import AutoTokenizer

    tokenizer = from_folder(AutoTokenizer, folder, TOKENIZER)
    if not isinstance(tokenizer.model_max_length, int | float):
        length = tokenizer.model_max_length
        raise BadInput(f"the tokenizer of {folder} is damaged: model_max_length is {length!r}; {TOKENIZER.advice}")
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    set_padding(tokenizer, config_of(folder))
    return tokenizer


def mapping_of(pairs: tuple[str, ...]) -> dict[str, str]:
    """Return --map COLUMN=NAME as a dictionary; a BadInput names the words that are not such pairs."""
    wrong = [pair for pair in pairs if not all(pair.partition("=")[::2])]
    if wrong:
        raise BadInput(f"--map {' '.join(wrong)} is not COLUMN=NAME, such as --map query=question reply=answer")
    return dict(pair.split("=", 1) for pair in pairs)


def stop_ids(folder: Path) -> tuple[int, ...]:
    """Return the tokens that end generation, by generation_config.json."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return ()
    if damaged := damaged_file(folder, GENERATION):
        raise BadInput(f"{damaged}; download it again")
    return tuple(check_ids(path, "eos_token_id", read_object(path).get("eos_token_id")))


def positions(folder: Path) -> int:
    """Return the tokens that a model can read; a recurrent one has no limit."""
    return context_length(read_config(folder))


def read_run_data(options: Train, home: Home) -> RunData:
    """Read the data of a run, tokenize them, and hold some out; a BadInput says what cannot be used."""
    max_length = checked_length(options.max_length, positions(home.folder), home.name)
    template = None if options.chat_template is None else read_template(options.chat_template)
    tokenizer = open_tokenizer(home.folder, template)
    check_tokens(options.chat_template or "", tokenizer)
    train, held_out = _tokenized(options, tokenizer, home, max_length)
    if options.eval_every is not None and held_out is None:
        raise BadInput("--eval-every needs held-out examples: give --valid DATA, or a larger --held-out")
    is_pair = is_encoder_decoder(home.folder) and not train.label_names
    if train.media is not None:
        tokenizer = train.media.processor.tokenizer
    check_vocabulary([data for data in (train, held_out) if data], tokenizer, home.folder, home.name)
    if is_pair:
        _check_pairs(options, train, held_out, tokenizer)
    packed = None
    if options.packing:
        check_keeps_apart(home.folder, home.name)
        packed = pack([len(tokens) for tokens in train.input_ids], max_length)
    return RunData(tokenizer, train, held_out, max_length, is_pair, packed)


def is_encoder_decoder(folder: Path) -> bool:
    """Return whether a model has an encoder that reads and a decoder that writes."""
    return bool(read_config(folder).is_encoder_decoder)


def _check_pairs(options: Train, train: Tokenized, held_out: Tokenized | None, tokenizer: Any) -> None:
    """Refuse examples without a prompt, and options that an encoder-decoder model does not have."""
    chosen = {"--packing": options.packing, "--activation-offload": options.activation_offload == "yes"}
    if given := [flag for flag, is_on in chosen.items() if is_on]:
        raise BadInput(f"{options.base} is an encoder-decoder model, which {' and '.join(given)} cannot be used for")
    for data in (train, held_out):
        if data is not None:
            encoder_decoder.sources_and_targets(data, tokenizer)


def _tokenized(options: Train, tokenizer: Any, home: Home, max_length: int) -> tuple[Tokenized, Tokenized | None]:
    """Return the tokenized examples that are trained and those that are held out."""
    has_labels = options.task != "causal"
    chosen: Any = {"max_length": max_length, "loss_on": options.loss_on, "stop_ids": stop_ids(home.folder)}
    recipe = Recipe(tokenizer, home.folder, mapping_of(options.map), has_labels, chosen)
    large = None if is_encoder_decoder(home.folder) else open_large(options.data, options.split, recipe)
    train, valid = read_train(options.data, options.split, options.valid, is_read=large is not None)
    examples = recognise(train, recipe.mapping, labels=has_labels) if large is None else large.first
    check_hears(home.architecture, home.name, examples)
    _check_task(options, examples, home)
    _check_kind(options, examples)
    others = None if valid is None else recognise(valid, recipe.mapping, labels=has_labels)
    if others is not None and others.kind != examples.kind:
        raise BadInput(f"{others.places.source} holds {others.kind} examples, {examples.places.source} {examples.kind}")
    if examples.kind == "speech":
        data, held_out = (one and tokenize_speech(one, home.folder, max_length) for one in (examples, others))
        assert data is not None, "of the examples"
        return _hold_out(data, options) if held_out is None and options.held_out else (data, held_out)
    if examples.has_images or (others is not None and others.has_images):
        _check_images(options, examples, home)
        processor = open_processor(home.folder, tokenizer.chat_template if options.chat_template else None)
        data = tokenize_images(examples, processor, **chosen)
        if others is not None:
            return data, tokenize_images(others, processor, **chosen)
        return _hold_out(data, options) if options.held_out else (data, None)
    data = tokenize(examples, tokenizer, **chosen, label_names=None) if large is None else large.tokens()
    if others is None:
        return _hold_out(data, options) if options.held_out else (data, None)
    return data, tokenize(others, tokenizer, **chosen, label_names=data.label_names or None)


def _check_task(options: Train, examples: Examples, home: Home) -> None:
    """Refuse data that the task cannot use, and labelled texts for which the task is open."""
    source, held = examples.places.source, f"{examples.kind} examples"
    is_labelled, is_causal = examples.kind == "labelled", home.architecture in writers()
    if options.task == "classification" and not is_labelled:
        raise BadInput(f"--task classification needs the columns text and label; {source} holds {held}")
    if options.task == "auto" and is_labelled and is_causal:
        raise BadInput(
            f"{source} has the columns text and label, and {home.name} is a language model: give --task "
            "classification to train a classifier of the labels, or --task causal to train on the texts alone"
        )
    if not is_labelled and not is_causal:
        raise BadInput(
            f"{home.name} is a {home.architecture}, which does not predict tokens: it can only be trained to classify, "
            f"from the columns text and label, and {source} holds {held}"
        )
    is_chat = not examples.literal or examples.kind == "chat" or isinstance(examples.rows[0].get("prompt"), list)
    if options.chat_template is not None and not is_chat:
        raise BadInput(f"--chat-template is for conversations and instructions; {source} holds {held}")


def _check_images(options: Train, examples: Examples, home: Home) -> None:
    """Refuse images for a model that does not read them, and options that examples with images do not have."""
    check_reads_images(home.architecture, home.name, examples.places.source)
    chosen = {"--packing": options.packing, "--layer-major": options.layer_major}
    if given := [flag for flag, is_on in chosen.items() if is_on]:
        raise BadInput(f"{examples.places.source} has images, with which {' and '.join(given)} cannot be used")


def tokenize_speech(examples: Examples, folder: Path, max_length: int) -> Tokenized:
    """Return sounds and their texts as the model in a folder reads and writes them."""
    first = read_config(folder).decoder_start_token_id
    processor = open_processor(folder, of="sound")
    return encoder_decoder.tokenize_sounds(examples, processor, max_length=max_length, first_token=first)


def check_hears(architecture: str, name: str, examples: Examples) -> None:
    """Refuse sounds for a model that reads text, and texts for one that hears."""
    source = examples.places.source
    if examples.kind == "speech" and not hears(architecture):
        raise BadInput(
            f"{source} has the column audio, which {name}, a {architecture}, does not hear: give a model such as "
            "Whisper, or remove the column"
        )
    if examples.kind != "speech" and hears(architecture):
        raise BadInput(
            f"{name} is a {architecture}, which learns from the columns audio and text; {source} has no audio"
        )


def check_reads_images(architecture: str, name: str, source: str) -> None:
    """Refuse images in the data of a model that reads only text, or that is not a decoder."""
    if not reads_images(architecture):
        raise BadInput(
            f"{source} has images, which {name}, a {architecture}, does not read: give an image-language model, or "
            "remove the images"
        )


def _check_kind(options: Train, examples: Examples) -> None:
    """Refuse options that only language models have, where texts are labelled."""
    chosen = {"--packing": options.packing, "--activation-offload": options.activation_offload == "yes"}
    given = [flag for flag, is_on in chosen.items() if is_on]
    if examples.kind == "labelled" and given:
        raise BadInput(
            f"{examples.places.source} holds labelled texts, which train a classifier; {' and '.join(given)} "
            "can be used for language models only"
        )


NOUNS = {
    "chat": "conversations",
    "pair": "prompt/completion pairs",
    "speech": "sounds and their texts",
    "text": "texts",
    "labelled": "labelled texts",
}


def first_lines(options: Train, data: RunData) -> list[str]:
    """Return what a run trains, which examples were cut, and whether few are held out."""
    lines = [f"Training: {in_words(data.train, data.held_out, options.chat_template)}"]
    cut = {one.places.source: one for one in (data.train, data.held_out) if one and one.truncated}
    lines += [cut_in_words(one, data.max_length) for one in cut.values()]
    count = len(data.held_out.input_ids) if data.held_out else 0
    if count >= LEAST_HELD_OUT or (count == 0 and options.held_out == 0):
        return lines
    total = count + len(data.train.input_ids)
    return [
        *lines,
        f"Held out: {count} of {total} examples, since {LEAST_HELD_OUT} are more than a tenth: too few for an exact "
        "held-out loss; give --valid DATA or a larger --held-out"
        if options.valid is None
        else f"the validation data have {count} examples: with fewer than {LEAST_HELD_OUT} their loss is a rough one",
    ]


def in_words(data: Tokenized, held_out: Tokenized | None, template: str | None) -> str:
    """Return what a run trains, for its first line.

    Args:
        template: The chat template that was asked for; None is that of the tokenizer.
    """
    task = f"classifier of {len(data.label_names)} classes" if data.label_names else "causal language model"
    task = "speech recognition" if data.kind == "speech" else task
    parts = []
    if data.places.unit:  # not one text
        parts.append(f"column{'s' if len(data.columns) > 1 else ''} {', '.join(data.columns)}")
    if data.kind in ("chat", "pair"):
        parts.append(f"chat template {template or 'of the model'}" if data.has_template else "no chat template")
    how = f" ({'; '.join(parts)})" if parts else ""
    unit = "sequences" if data.kind == "text" else "examples"
    others = f" and {len(held_out.input_ids):,} held out" if held_out else ""
    count = f"{len(data.input_ids):,} {unit}{others}"
    if data.label_names:
        return f"{task} on {NOUNS[data.kind]}{how}, {count}, {short_count(data.num_tokens)} tokens"
    tokens = f"{short_count(data.num_trained)} of {short_count(data.num_tokens)} tokens trained"
    return f"{task} on {NOUNS[data.kind]}{how}, {count}, {tokens}"


def cut_in_words(data: Tokenized, max_length: int) -> str:
    """Return a sentence on the examples that were cut, or left out since images cannot be cut."""
    if data.media is not None:
        images = "" if data.kind == "speech" else ", images included,"
        return (
            f"{data.places.source}: {data.dropped:,} examples with more than {max_length:,} tokens (--max-length)"
            f"{images} were left out; {data.cut_tokens:,} tokens are not used"
        )
    dropped = f", {data.dropped:,} of them left out, since no trained token remained" if data.dropped else ""
    return (
        f"{data.places.source}: {data.truncated:,} examples were cut at {max_length:,} tokens (--max-length){dropped}; "
        f"{data.cut_tokens:,} tokens are not used"
    )


def checked_length(wanted: int | None, context: int, model: str) -> int:
    """Return --max-length, or the model's context, at most MOST_LENGTH; a BadInput where it is above the context."""
    if wanted is not None and wanted > context:
        raise BadInput(f"--max-length {wanted} is above {context}, the context length of {model}")
    return wanted or min(MOST_LENGTH, context)


def _hold_out(data: Tokenized, options: Train) -> tuple[Tokenized, Tokenized | None]:
    """Divide the sequences into those that are trained and a share, drawn by the seed, that is held out.

    Fewer than 8 are raised to 8, unless that is more than a tenth of all.
    """
    total = len(data.input_ids)
    count = min(MOST_HELD_OUT, max(1, round(options.held_out * total)))
    if count < LEAST_HELD_OUT <= total / 10:
        count = LEAST_HELD_OUT
    if count >= total:
        return data, None
    order = torch.randperm(total, generator=torch.Generator().manual_seed(options.seed)).tolist()
    return data.take(sorted(order[count:])), data.take(sorted(order[:count]))
