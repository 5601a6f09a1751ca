"""Options of `qsvd generate` to a checked run: the model that was found, its prompts as tensors, how it samples."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qsvd.data import plain
from qsvd.data.chat import ChatTemplate, Message, render
from qsvd.data.encoder_decoder import end_tokens
from qsvd.data.examples import is_encoder_decoder, open_tokenizer
from qsvd.data.images import hears, open_processor, read_question, reads_images, reads_sounds
from qsvd.data.masks import ends_of_turn
from qsvd.data.media import open_each, open_images, open_sound
from qsvd.errors import BadInput, listing
from qsvd.files.source import read_config
from qsvd.files.split_folder import open_split
from qsvd.inputs.model_files import generation_config
from qsvd.memory.block_bytes import Batch
from qsvd.memory.device import device_of, dtype_of
from qsvd.memory.items import EVERYTHING
from qsvd.memory.placement import Wish
from qsvd.options import Generate
from qsvd.plan.weights import context_length, writers
from qsvd.prepare.check_options import check
from qsvd.prepare.machine import machine, place_generating
from qsvd.prepare.models import NamedModel, class_of, find_model, load_model, record_of

if TYPE_CHECKING:
    from transformers import GenerationConfig

MOST_NEW_TOKENS = 512  # unless more are asked for
CHAT_TOKENS = 2048  # of a conversation, for which memory is planned
FIRST_TOKENS = 4  # of Whisper's decoder, at most: start, language, task, no times
Inputs = dict[str, Tensor]  # what a model reads: input_ids [1, tokens], attention_mask, tensors of images


@dataclass(frozen=True)
class GenerateRun:
    """A checked run of `qsvd generate`.

    Args:
        template: None without a chat template, and with --raw.
        sampling: All of transformers' options but the length.
        context: The tokens that the model can read, prompt and answer together.
        processor: Of images and sounds, where there are any.
        images, sounds: Open ones; every prompt is about all of them.
        prompts: What the model reads of each prompt, or of each sound if it reads no text; none for a chat.
    """

    options: Generate
    found: NamedModel
    tokenizer: Any
    template: ChatTemplate | None
    sampling: "GenerationConfig"
    context: int
    device: torch.device
    dtype: torch.dtype
    processor: Any = None
    images: tuple[Any, ...] = ()
    sounds: tuple[Any, ...] = ()
    prompts: tuple[Inputs, ...] = ()

    @property
    def unit(self) -> str:
        """What each answer is of."""
        return "prompt" if self.prompts and "input_ids" in self.prompts[0] else "sound"

    @property
    def pixels(self) -> int:
        """Numbers that the processor makes of the images and sounds."""
        if self.processor is None:
            return 0
        inputs = self.prompts[0] if self.prompts else inputs_of(self, [said("")])
        return sum(value.numel() for value in inputs.values() if value.is_floating_point())


def prepare_generate(options: Generate, prompts: Sequence[str]) -> GenerateRun:
    """Open the model without its weights, and refuse what it cannot generate from.

    Args:
        prompts: The texts; none for a chat. With sounds there may be none: the question is in them.

    Raises:
        BadInput: an option, an image, a sound or a prompt cannot be used, the model generates no text, reads no images
            or does not hear, or a prompt and its answer are longer than its context.
    """
    check(options)
    device = device_of(options.device)
    found = find_model(options.model, options.base)
    _check_generates(found, options)
    images, sounds, processor = _media(options, found)
    tokenizer = processor.tokenizer if processor else open_tokenizer(found.home, found.chat_template)
    config = read_config(found.home)
    ends = [] if found.chat_template is None else ends_of_turn(tokenizer)
    sampling = _sampling(options, generation_config(found.home, config), [*ends, tokenizer.eos_token_id])
    run = GenerateRun(
        options,
        found,
        tokenizer,
        _template(options, processor or tokenizer, tokenizer),
        sampling,
        context_length(config.get_text_config()),
        device,
        dtype_of(options.dtype, device),
        processor,
        images,
        sounds,
    )
    if hears(class_of(found)):
        read = tuple(_heard(processor, sound) for sound in sounds)
    else:
        texts = prompts or ("",) * (not options.chat)
        read = tuple(inputs_of(run, [*started(options), said(prompt)]) for prompt in texts)
    for length in [num_tokens(inputs) for inputs in read] or [1]:
        new_tokens(run, length)
    return replace(run, prompts=read)


def started(options: Generate) -> list[Message]:
    """Return the messages before the first one of the user."""
    return [] if options.system is None else [{"role": "system", "content": options.system}]


def said(text: str) -> Message:
    """Return a message of the user."""
    return {"role": "user", "content": text}


def inputs_of(run: GenerateRun, messages: list[Message]) -> Inputs:
    """Return what the model reads before an answer, on the CPU.

    It is the conversation, or its last text where there is no template, with all images.

    Raises:
        BadInput: it has no tokens, the template cannot render the conversation, or the processor refuses it.
    """
    if run.processor is not None:
        return read_question(run.processor, messages, run.images, run.sounds, raw=run.template is None)
    if run.template is None:
        (tokens,) = plain.prompts([messages[-1]["content"]], run.tokenizer)
    else:
        (tokens,) = plain.encode([render(run.template, messages, begin=True)], run.tokenizer)
    if is_encoder_decoder(run.found.home):
        tokens = [*tokens, *end_tokens(run.tokenizer)]
    if not tokens:
        raise BadInput("the prompt has no tokens: give a text")
    ids_NT = torch.tensor([tokens])
    return {"input_ids": ids_NT, "attention_mask": torch.ones_like(ids_NT)}


def num_tokens(inputs: Inputs) -> int:
    """Return the tokens of a prompt, those of images included; of a sound alone, those that the decoder starts with."""
    return inputs["input_ids"].shape[1] if "input_ids" in inputs else FIRST_TOKENS


def new_tokens(run: GenerateRun, length: int) -> int:
    """Return the largest number of tokens of an answer to a prompt of this length.

    Raises:
        BadInput: prompt and answer are longer than what the model can read.
    """
    room, asked, name = run.context - length, run.options.max_new_tokens, run.found.name
    if room < 1:
        raise BadInput(f"the prompt has {length} tokens, and {name} reads {run.context} with the answer: shorten it")
    if asked is not None and asked > room:
        raise BadInput(
            f"--max-new-tokens {asked} and a prompt of {length} tokens are more than the {run.context} that {name} "
            f"reads: give at most {room}"
        )
    return asked or min(room, run.sampling.max_new_tokens or MOST_NEW_TOKENS)


def load_generating(run: GenerateRun) -> Any:
    """Load the model; as many blocks stay on the device as fit.

    Raises:
        BadInput: it cannot be loaded.
        DoesNotFit: there is too little memory.
    """
    placement = EVERYTHING
    if run.found.kind != "16-bit":
        split = open_split(run.found.home)
        lengths = [length + new_tokens(run, length) for length in map(num_tokens, run.prompts)]
        tokens = max(lengths, default=min(CHAT_TOKENS, run.context))
        batch = Batch(tokens, 1, is_masked=True, checkpointing=True, device=run.device.type)
        here = machine(run.device, run.dtype)
        wish, record = Wish(run.options.resident), record_of(run.found, split)
        placement = place_generating(split, record, batch, wish, here, pixels=run.pixels)
    return load_model(run.found, run.device, run.dtype, placement=placement)


def _check_generates(found: NamedModel, options: Generate) -> None:
    """Refuse classifiers and encoders, and texts for a model that only hears."""
    if found.labels:
        raise BadInput(
            f"{found.name} is a classifier ({listing(found.labels)}), which generates no text; give a language model"
        )
    name = class_of(found)
    if hears(name):
        texts = {"--prompt": options.prompt, "--chat": options.chat, "--system": options.system, "--raw": options.raw}
        given = [flag for flag, value in (texts | {"--image": options.image}).items() if value]
        if given or not options.audio:
            change = f"leave out {' and '.join(given)}" if given else "give --audio FILE"
            raise BadInput(f"{found.name} is a {name}, which writes what it hears and reads no text: {change}")
        return
    if name and name not in writers():
        raise BadInput(f"{found.name} is a {name}, which generates no text; give a language model")


def _media(options: Generate, found: NamedModel) -> tuple[tuple[Any, ...], tuple[Any, ...], Any]:
    """Return the images and the sounds, open, and the processor that reads them; None without --image and --audio."""
    name, images, sounds, processor = class_of(found), (), (), None
    if options.image and not reads_images(name):
        raise BadInput(
            f"--image: {found.name}, a {name or 'model'}, does not read images: give an image-language model"
        )
    if options.audio and not (hears(name) or reads_sounds(name)):
        raise BadInput(f"--audio: {found.name}, a {name or 'model'}, does not hear: give a model such as Whisper")
    if options.image:
        images = _opened("--image", lambda: open_images(options.image, Path()))
        processor = open_processor(found.home, found.chat_template)
    if options.audio:
        processor = processor or open_processor(found.home, found.chat_template, of="sound")
        extractor = processor.feature_extractor
        limits = {"rate": extractor.sampling_rate, "longest": getattr(extractor, "n_samples", None)}
        sounds = _opened("--audio", lambda: open_each(options.audio, partial(open_sound, folder=Path(), **limits)))
    return images, sounds, processor


def _opened(flag: str, opener: Callable[[], list[Any]]) -> tuple[Any, ...]:
    try:
        return tuple(opener())
    except BadInput as error:
        raise BadInput(f"{flag}: {error}") from error


def _heard(processor: Any, sound: Any) -> Inputs:
    """Return what a model that reads no text reads of a sound."""
    extractor = processor.feature_extractor
    return dict(extractor(sound, sampling_rate=extractor.sampling_rate, return_tensors="pt"))


def _template(options: Generate, owner: Any, tokenizer: Any) -> ChatTemplate | None:
    """Return the chat template of a tokenizer, or of a processor and its tokenizer."""
    if options.raw:
        return None
    if owner.chat_template is not None:
        template = tokenizer.get_chat_template() if owner is tokenizer else owner.chat_template
        return ChatTemplate(tokenizer, template, template)
    flag = "--chat" if options.chat else "--system" if options.system is not None else None
    if flag is not None:
        raise BadInput(
            f"{flag} needs a chat template, and the tokenizer of {options.model} has none: use a chat model, or put a "
            "chat_template.jinja next to the tokenizer"
        )
    return None


def _sampling(options: Generate, given: "GenerationConfig", ends: list[int | None]) -> "GenerationConfig":
    """Return the model's own generation config with the options in it; one sequence, so that it can be streamed."""
    chosen = copy.deepcopy(given)
    chosen.update(num_beams=1, num_return_sequences=1, return_dict_in_generate=False, max_length=None)
    if options.temperature == 0:
        chosen.update(do_sample=False, temperature=1.0, top_p=1.0, top_k=50)
    elif options.temperature is not None or options.top_p is not None:
        chosen.do_sample = True
        chosen.temperature = given.temperature if options.temperature is None else options.temperature
        chosen.top_p = given.top_p if options.top_p is None else options.top_p
    own = given.eos_token_id
    known = [*(own if isinstance(own, list) else [own]), *ends]
    chosen.eos_token_id = list(dict.fromkeys(token for token in known if token is not None)) or None
    if chosen.pad_token_id is None and chosen.eos_token_id:
        chosen.pad_token_id = chosen.eos_token_id[0]
    return chosen
