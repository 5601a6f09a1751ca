"""Tiny random models that read images, each with a real processor of transformers, and real PNG files."""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoTokenizer

import qsvd
from qsvd.commands.demo import MODEL
from tests.commands.trained_runs import factors_of
from tests.export.cases import residual

SIDE, PATCH = 16, 4  # pixels
TEXT = {
    "vocab_size": 4352,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
NAMED = {"image_token": "<image>", "boi_token": "<begin>", "eoi_token": "<end>"}
TURNS = ["<|im_start|>", "<|im_end|>"]
SCALE = 4.0  # of the matrices, so that every layer and every pixel changes the loss

PARTS = (
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}MARK{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
)
ANSWER = PARTS + "{{ '<|im_end|>\n' }}"
WHOLE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' %}ANSWER"
    "{% else %}" + ANSWER + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def template(mark, *, marked=True):
    """A chat template whose images are `mark`, with or without marks around what the assistant says."""
    answer = "{% generation %}" + ANSWER + "{% endgeneration %}" if marked else ANSWER
    return WHOLE.replace("ANSWER", answer).replace("MARK", mark)


def tokenizer():
    made = AutoTokenizer.from_pretrained(MODEL, extra_special_tokens=NAMED)
    made.add_tokens(TURNS, special_tokens=True)
    return made


def llava(words, chat_template):
    """576 tokens of a real LLaVA are 16 here."""
    from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaProcessor

    size = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size)
    processor = LlavaProcessor(
        images,
        words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )
    config = LlavaConfig(
        text_config=TEXT | {"model_type": "llama"},
        vision_config=VISION | {"model_type": "clip_vision_model"},
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    return processor, config


def gemma3(words, chat_template):
    from transformers import Gemma3Config, Gemma3ImageProcessorPil, Gemma3Processor

    images = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    processor = Gemma3Processor(images, words, chat_template=chat_template, image_seq_length=4)
    text = TEXT | {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    config = Gemma3Config(
        text_config=text,
        vision_config=VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        boi_token_index=words.convert_tokens_to_ids("<begin>"),
        eoi_token_index=words.convert_tokens_to_ids("<end>"),
    )
    return processor, config


KINDS = {
    "llava": (llava, "LlavaForConditionalGeneration", "<image>"),
    "gemma3": (gemma3, "Gemma3ForConditionalGeneration", "<begin>"),
}


def write_model(folder, kind="llava", *, marked=True):
    """A random model in float32 with its processor."""
    make, architecture, mark = KINDS[kind]
    processor, config = make(tokenizer(), template(mark, marked=marked))
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(SCALE).add_(0.02 * torch.randn_like(parameter))  # Gemma's projector starts at zero
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


def quantized(folder, kind):
    source = write_model(folder / "source", kind)
    return qsvd.quantize(qsvd.Quantize(str(source), out=folder / "out", rank=8, iterations=1, device="cpu")).path


def dense(base, kind, moved=None):
    """The model of transformers with Q + B A in float64's rounding to float32, or other weights, by module."""
    model = getattr(transformers, KINDS[kind][1]).from_pretrained(base.parent / "source", dtype=torch.float32)
    if moved is None:
        names = {
            weight["module"]: name for name, weight in json.loads((base / "qsvd.json").read_text())["weights"].items()
        }
        factors = factors_of(base)
        moved = {
            module: residual(base, name) + factors[module][0] @ factors[module][1] for module, name in names.items()
        }
    with torch.no_grad():
        for module, weight in moved.items():
            model.get_submodule(module).weight.copy_(torch.from_numpy(weight).float())
    return model.eval()


def picture(path, seed, size=(24, 20)):
    """A PNG file of random colours, smooth enough to differ after resizing."""
    colours = np.random.default_rng(seed).integers(0, 255, (4, 3, 3), dtype=np.uint8)
    Image.fromarray(colours).resize(size).save(path)
    return path


def chats(folder, count=6):
    """Conversations with one image each, in three spellings; relative paths."""
    rows = []
    for number in range(count):
        name = picture(folder / f"{number}.png", number).name
        question, answer = f"What is in picture {number}?", f"A field of colour {number}, and no cat."
        asked = [
            question,
            [{"type": "image"}, {"type": "text", "text": question}],
            [{"type": "text", "text": question}, {"type": "image", "path": name}],
        ][number % 3]
        row = {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
        rows.append(row | ({} if number % 3 == 2 else {"images": name if number % 2 else [name]}))
    return rows


def write_chats(folder, count=6):
    return write_lines(folder / "chats.jsonl", chats(folder, count))


def write_lines(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)
