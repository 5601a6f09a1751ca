"""OUT/README.md: what the folder is, and the commands to load, train, merge and serve it, ready to copy."""

import json
from shlex import quote

from qsvd.report.header import Header

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def readme(header: Header, folder: str, architecture: str) -> str:
    """The README of a result.

    Args:
        header: What was done.
        folder: Where the result is, as the user wrote it; the commands name it.
        architecture: Class name in transformers.
    """
    sections = [_opening(header), _load(header, folder, architecture)]
    if header.rank > 0:
        sections.append(_train(folder, architecture))
    sections.append(_merge(header, folder, architecture))
    if architecture.endswith("ForCausalLM"):
        sections.append(_serve(header, folder))
    return "\n\n".join(sections) + "\n"


def vllm_rank(rank: int) -> int:
    """The least --max-lora-rank of vLLM that a LoRA of this rank fits in."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), rank)


def _opening(header: Header) -> str:
    model = header.model.rstrip("/").rsplit("/", 1)[-1]
    if header.rank == 0:
        parts = "This folder is a transformers 4-bit checkpoint; there is no adapter, since the rank is 0."
    else:
        parts = (
            "This folder is a transformers 4-bit checkpoint of the *residual* Q = W - B A, and `adapter/` a PEFT LoRA\n"
            "with the principal components B and A. The two belong together: Q alone is not the model, and the\n"
            "adapter fits no other base."
        )
    return (
        f"# {model}, split by qsvd\n\n{parts}\n\n{header.method}.\n{header.reach}.\n\n"
        "What quantization cost is in `report.md`, per weight in `errors.jsonl`; `qsvd.json` records the run.\n"
        "The commands below need transformers, peft and bitsandbytes, not qsvd, and run where this path is valid;\n"
        "`qsvd train`, `qsvd eval` and `qsvd export` take the folder too."
    )


def _load(header: Header, folder: str, architecture: str) -> str:
    return _code("Load", "python", _loading(header.rank, folder, architecture))


def _train(folder: str, architecture: str) -> str:
    lines = _loading(1, folder, architecture, adapter=", is_trainable=True")
    return _code("Train", "python", [*lines, "model.print_trainable_parameters()"]) + (
        "\n\nGive `model` as it is to transformers' Trainer, or another that takes a PEFT model, without a\n"
        "`peft_config` of your own: nothing may initialize the adapter again. Principal components want a smaller\n"
        "learning rate than a LoRA that starts at zero."
    )


def _merge(header: Header, folder: str, architecture: str) -> str:
    lines = _loading(header.rank, folder, architecture, base=".dequantize()")
    if header.rank > 0:
        lines.append("model = model.merge_and_unload()")
    lines.append(f"model.save_pretrained({_literal(folder + '-merged')}, save_original_format=False)")
    return _code("Merge into 16 bits", "python", lines)


def _loading(rank: int, folder: str, architecture: str, *, base: str = "", adapter: str = "") -> list[str]:
    """Lines that load the model; `base` follows the call for the residual, `adapter` ends the one for the factors."""
    path = _literal(folder)
    lines = [f"from transformers import {architecture}", "", f"model = {architecture}.from_pretrained({path}){base}"]
    if rank == 0:
        return lines
    adding = f'model = PeftModel.from_pretrained(model, {path}, subfolder="adapter"{adapter})'
    return ["from peft import PeftModel", *lines, adding]


def _serve(header: Header, folder: str) -> str:
    command = f"vllm serve {quote(folder)} --quantization bitsandbytes"
    if header.rank > 0:
        rank = vllm_rank(header.rank)
        command += f" --enable-lora --max-lora-rank {rank} --lora-modules principal={quote(folder + '/adapter')}"
    convert = f"python convert_hf_to_gguf.py {quote(folder + '-merged')} --outtype bf16  # llama.cpp, after merging"
    note = "\n\nAsk vLLM for the model `principal`, not for the base: the base is the residual." if header.rank else ""
    return _code("Serve", "sh", [command, convert]) + note


def _literal(text: str) -> str:
    """The text as a Python string in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _code(title: str, language: str, lines: list[str]) -> str:
    body = "\n".join(lines)
    return f"## {title}\n\n```{language}\n{body}\n```"
