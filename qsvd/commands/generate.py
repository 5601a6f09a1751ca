"""`qsvd generate`: answers of a 16-bit model, a quantized model or a run, printed token by token."""

import copy
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TextStreamer

from qsvd.console.progress import quiet, say
from qsvd.errors import BadInput, Interrupted, visible
from qsvd.evaluate.exact_match import FiniteLogits
from qsvd.options import Generate
from qsvd.prepare.generate import (
    GenerateRun,
    Inputs,
    inputs_of,
    load_generating,
    new_tokens,
    num_tokens,
    prepare_generate,
    said,
    started,
)


def main(options: Generate) -> None:
    """Run `qsvd generate`: 1 read the prompts and check, 2 load the model, 3 answer, 4 print the speed.

    Raises:
        Interrupted: after Ctrl-C; what was generated until then is printed.
    """
    with quiet(reads_data=False):
        is_read = not (options.chat or options.prompt or options.audio)
        run = prepare_generate(options, (_stdin(),) if is_read else options.prompt)  # 1
        model = load_generating(run)  # 2
        torch.manual_seed(options.seed)
        streamer = _Shown(run.tokenizer, skip_prompt=True, skip_special_tokens=True)
        count, seconds = 0, 0.0
        for tokens in _chat(run, model, streamer) if options.chat else _answers(run, model, streamer):  # 3
            count, seconds = count + tokens[0], seconds + tokens[1]
    if count > 1 or sys.stderr.isatty():
        say(f"{count} tokens, {count / max(seconds, 1e-9):.1f} tokens/s", file=sys.stderr)  # 4


def generate(  # noqa: PLR0913  # the options of the command
    model: str | Path,
    prompt: str | Sequence[str] = (),
    *,
    image: str | Path | Sequence[str | Path] = (),
    audio: str | Path | Sequence[str | Path] = (),
    system: str | None = None,
    raw: bool = False,
    temperature: float | None = None,
    top_p: float | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
    base: str | Path | None = None,
    dtype: Literal["auto", "bfloat16", "float32"] = "auto",
    resident: Literal["auto"] | float = "auto",
    device: str = "auto",
) -> str | list[str]:
    """Return what `qsvd generate` prints: the answer to one prompt (or one sound without a prompt), a list for several.

    The model is loaded once for all prompts.

    Args:
        model: A 16-bit model, a quantized model, a run, or a Hub id.
        prompt: A text or several; a user's message each where the tokenizer has a chat template, unless `raw`.
        image: Paths of images, for an image-language model; every prompt is about all of them.
        audio: Paths of WAV files, for a model that hears. Whisper has no prompt, and writes what is said in each.
        system: The system prompt; it needs a chat template.
        raw: Whether to give the prompt to the model as it is.
        temperature, top_p: 0 is greedy; None is what generation_config.json says, else greedy.
        max_new_tokens: Tokens of an answer; None is what generation_config.json says, else 512, if it fits.
        base: The quantized model of a run, if it has moved.
        resident: The fraction of blocks whose weights stay on the GPU.

    Raises:
        BadInput: an option, the model or a prompt cannot be used.
        DoesNotFit: there is too little memory.
    """
    prompts = _texts(prompt, audio)
    options = Generate(
        str(model),
        prompts,
        image=_paths(image),
        audio=_paths(audio),
        system=system,
        raw=raw,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        seed=seed,
        base=None if base is None else Path(base),
        dtype=dtype,
        resident=resident,
        device=device,
    )
    with quiet(reads_data=False):
        loaded = load_generating(run := prepare_generate(options, prompts))
        with torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else []):
            torch.manual_seed(seed)
            answers = [_text(run, _answer(run, loaded, inputs, None)) for inputs in run.prompts]
    return answers[0] if isinstance(audio if not prompts else prompt, str | Path) else answers


def _texts(prompt: str | Sequence[str], audio: object) -> tuple[str, ...]:
    prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
    if not prompts and not audio:
        raise BadInput("there is no prompt: give at least one text")
    return prompts


def _paths(given: str | Path | Sequence[str | Path]) -> tuple[str, ...]:
    return tuple(map(str, (given,) if isinstance(given, str | Path) else given))


class _Shown(TextStreamer):
    """Prints an answer while it is made; on a terminal with its control characters as escapes."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(visible(text) if sys.stdout.isatty() else text, stream_end)


def _answers(run: GenerateRun, model: Any, streamer: TextStreamer) -> Iterator[tuple[int, float]]:
    """Print the answer to every prompt; yield its tokens and seconds."""
    for number, inputs in enumerate(run.prompts, start=1):
        if len(run.prompts) > 1:
            say(f"{run.unit} {number} of {len(run.prompts)}", file=sys.stderr, flush=True)
        begun = time.monotonic()
        answer = _answer(run, model, inputs, streamer)
        yield len(answer), time.monotonic() - begun


def _chat(run: GenerateRun, model: Any, streamer: TextStreamer) -> Iterator[tuple[int, float]]:
    """Print the answer to every message of the user, given all before it; yield its tokens and seconds."""
    messages = started(run.options)
    for line in _lines():
        messages.append(said(line))
        begun = time.monotonic()
        answer = _answer(run, model, inputs_of(run, messages), streamer)
        messages.append({"role": "assistant", "content": _text(run, answer)})
        yield len(answer), time.monotonic() - begun


def _answer(run: GenerateRun, model: Any, inputs: Inputs, streamer: TextStreamer | None) -> list[int]:
    """Return the token ids of the answer to a prompt, by transformers' generate."""
    chosen = copy.deepcopy(run.sampling)
    chosen.max_new_tokens = new_tokens(run, num_tokens(inputs))
    placed = {
        name: value.to(run.device, run.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }
    try:
        output_NT = model.generate(
            **placed, generation_config=chosen, streamer=streamer, logits_processor=[FiniteLogits()]
        )
    except KeyboardInterrupt as error:
        if streamer is not None:
            streamer.end()
        raise Interrupted("interrupted") from error
    if "input_ids" not in inputs:  # Whisper leaves out the first tokens itself
        return output_NT[0].tolist()
    begin = 1 if model.config.is_encoder_decoder else num_tokens(inputs)  # a decoder starts with one token of its own
    return output_NT[0, begin:].tolist()


def _text(run: GenerateRun, answer: list[int]) -> str:
    return str(run.tokenizer.decode(answer, skip_special_tokens=True))


def _stdin() -> str:
    """Return the text on stdin without its last line break."""
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise BadInput(f"stdin is not a text in UTF-8: {error}") from error
    if not text.strip():
        raise BadInput("stdin is empty: give --prompt TEXT, --chat, or a text on stdin")
    return text.removesuffix("\n")


def _lines() -> Iterator[str]:
    """Yield the lines of the user until an empty one, /exit or the end of stdin."""
    mark = ""
    if sys.stdin.isatty() and sys.stdout.isatty():
        import readline  # noqa: F401  # input() then edits lines

        mark = "> "
    while True:
        try:
            line = input(mark)
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise BadInput(f"stdin is not a text in UTF-8: {error}") from error
        if line.strip() in ("", "/exit"):
            return
        yield line
