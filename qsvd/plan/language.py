"""The parts of a model that reads text, images or sound, and an input that each part can read.

transformers' own classes say which part reads what (`input_modalities`) and which one writes text (`get_decoder`).
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

MARKS = ("_token_id", "_token_index")  # of tokens that stand for images and sound, or begin and end a text
STATES = {"linear_attention", "conv", "hybrid", "hybrid_sliding", "mamba", "recurrent"}  # kinds of layers
MIXING = (  # whose masks, in transformers 5.23, are not made from positions; measured, or read in their code
    *("afmoe", "biogpt", "bloom", "cpmant", "falcon", "gpt_oss", "minimax", "mpt", "openai-gpt", "opt", "paligemma"),
    *("qwen2_5_vl", "qwen2_vl", "xglm"),
)
SOUND = 16_000  # numbers of a second of sound, for models that read it as it is


def modalities(model: nn.Module) -> tuple[str, ...]:
    """Return what a transformers model reads: "text", "image", "audio" ..."""
    found = getattr(model, "input_modalities", None) or "text"
    return (found,) if isinstance(found, str) else tuple(found)


def has_towers(model: "PreTrainedModel") -> bool:
    """Tell whether a model writes text from tokens, and reads images or sound with other parts."""
    is_writer = model.can_generate() and model.main_input_name == "input_ids"
    return is_writer and not model.config.is_encoder_decoder and any(kind != "text" for kind in modalities(model))


def language_model(model: "PreTrainedModel") -> Any:
    """Return the part that reads tokens: the decoder of a model with towers, else the model without its head."""
    decoder = model.get_decoder() if has_towers(model) else model
    return model.base_model if decoder is model else decoder


def towers(model: "PreTrainedModel") -> tuple[str, ...]:
    """Return the paths of the parts that read images and sound; none for a model that does not write text.

    These are all parts beside the language model, and parts of it that do not read text.
    """
    from transformers import PreTrainedModel

    if not has_towers(model):
        return ()
    paths = {id(module): path for path, module in model.named_modules()}
    decoder = paths[id(language_model(model))]
    head = {id(model.get_output_embeddings())}
    depths = range(len(decoder.split("."))) if decoder else ()
    parents = [".".join(decoder.split(".")[:depth]) for depth in depths]
    beside = [
        f"{parent}.{name}".removeprefix(".")
        for parent in parents
        for name, child in model.get_submodule(parent).named_children()
        if id(child) not in head and not is_in(decoder, [f"{parent}.{name}".removeprefix(".")])
    ]
    within = [
        path
        for path, module in model.named_modules()
        if path != decoder and isinstance(module, PreTrainedModel) and "text" not in modalities(module)
    ]
    return (*beside, *within)


def is_in(path: str, parts: Iterable[str]) -> bool:
    """Tell whether a path is one of these parts or inside of one."""
    return any(path == part or path.startswith(f"{part}.") for part in parts)


def example_inputs(
    model: "PreTrainedModel", batch: int, tokens: int, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Return an input that a model accepts, drawn from a fixed seed.

    Args:
        batch: Sequences, images or sounds.
        tokens: Of a sequence.
    """
    config, kinds, main = model.config, modalities(model), model.main_input_name
    draw = torch.Generator().manual_seed(0)
    made: dict[str, Tensor] = {}
    special = [number for name, number in vars(config).items() if name.endswith(MARKS) and isinstance(number, int)]
    plain = next(number for number in range(len(special) + 1) if number not in special)

    def ids() -> Tensor:
        drawn = torch.randint(config.get_text_config().vocab_size, (batch, tokens), generator=draw)
        return drawn.where(~torch.isin(drawn, torch.tensor(special)), plain)

    if main in ("input_ids", "decoder_input_ids"):
        made[main] = ids()
    if "pixel_values" in (main, *(["pixel_values"] if "image" in kinds and not model.can_generate() else [])):
        made["pixel_values"] = torch.randn(batch, *_image(config), generator=draw)
    if main == "input_features":
        made[main] = torch.randn(batch, *_sound(config), generator=draw)
    if main == "input_values":
        made[main] = torch.randn(batch, SOUND, generator=draw)
    if config.is_encoder_decoder:
        made["decoder_input_ids"] = ids()
    return {name: value.to(device) for name, value in made.items()}


def _image(config: "PreTrainedConfig") -> tuple[int, int, int]:
    """Return channels, height and width of an image."""
    vision: Any = getattr(config, "vision_config", config)
    size = vision.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return vision.num_channels, height, width


def _sound(config: Any) -> tuple[int, int]:
    """Return bands and frames of a spectrogram; an encoder halves the frames."""
    audio = getattr(config, "audio_config", config)
    return audio.num_mel_bins, 2 * audio.max_source_positions


def why_mixed(config: "PreTrainedConfig") -> str | None:
    """Return why a model of this config mixes sequences that share a row, or may do so; None if nothing is known."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    if kinds & STATES or text.model_type in ("rwkv", "xlstm"):
        return f"{text.model_type} has layers with a state that goes on from one sequence of a row to the next"
    names = {config.model_type, text.model_type, text.model_type.removesuffix("_text")}
    if names & set(MIXING):
        return f"in transformers, {config.model_type} lets tokens see the sequences before theirs in a row"
    return None
