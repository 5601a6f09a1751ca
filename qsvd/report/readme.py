"""OUT/README.md: what the folder holds, and commands to load, train, merge and serve it, ready to copy."""

import json
from shlex import quote

from qsvd.report.header import ReportHeader

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def readme(header: ReportHeader, folder: str, architecture: str) -> str:
    """Return the README of a quantized model.

    Args:
        folder: Path of the quantized model as the user wrote it; the commands name it.
        architecture: Class name in transformers.
    """
    sections = [_opening(header), _code("Load", "python", _loading(header, folder, architecture))]
    if header.rank > 0:
        lines = _loading(header, folder, architecture, adapter=", is_trainable=True")
        sections.append(
            _code("Train", "python", [*lines, "model.print_trainable_parameters()"])
            + "\n\nGive `model` to transformers' Trainer, or to another trainer that takes a PEFT model. Do not give\n"
            "the trainer a `peft_config`: it would replace the stored components by new ones. Use a smaller learning\n"
            "rate than for a LoRA that starts at zero."
        )
    merged = [
        *_loading(header, folder, architecture, base=".dequantize()"),
        *(["model = model.merge_and_unload()"] if header.rank > 0 else []),
        f"model.save_pretrained({_literal(folder + '-merged')}, save_original_format=False)",
    ]
    sections.append(_code("Merge into a 16-bit model", "python", merged))
    if architecture.endswith("ForCausalLM"):
        sections.append(_serve(header, folder))
    return "\n\n".join(sections) + "\n"


def vllm_rank(rank: int) -> int:
    """Return the smallest --max-lora-rank of vLLM that a LoRA of this rank fits in."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), rank)


def _opening(header: ReportHeader) -> str:
    model = header.model.rstrip("/").rsplit("/", 1)[-1]
    is_plain = header.quantizer == "bitsandbytes"
    kind = "4-bit checkpoint" if is_plain else "mixed-precision checkpoint"
    if header.rank == 0:
        parts = (
            f"This folder holds a quantized model as a transformers {kind}. It has no adapter, because the rank is 0."
        )
    else:
        parts = (
            f"This folder holds the quantized residual Q of each layer as a transformers {kind}, and the\n"
            "components B and A in 16 bits as a PEFT LoRA adapter in `adapter/` (W ≈ Q + B A). Always load both: the\n"
            "residual without the adapter gives wrong outputs, and the adapter works with no other model."
        )
    libraries = ("transformers", *(["peft"] if header.rank else []), "bitsandbytes" if is_plain else "qsvd")
    return (
        f"# {model}, quantized by qsvd\n\n{parts}\n\n{header.method}.\n{header.reach}.\n\n"
        "`report.md` lists the quantization error, `errors.jsonl` the error of every layer, `qsvd.json` the options.\n"
        f"The commands below need {', '.join(libraries[:-1])} and {libraries[-1]}. Run them where this path is valid.\n"
        "`qsvd train`, `qsvd eval` and `qsvd export` take this folder too."
    )


def _loading(header: ReportHeader, folder: str, architecture: str, *, base: str = "", adapter: str = "") -> list[str]:
    """Return lines that load the model; `base` is called on the residual, `adapter` is one more argument of PEFT's."""
    path = _literal(folder)
    lines = [f"from transformers import {architecture}", ""]
    if header.rank:
        lines.insert(0, "from peft import PeftModel")
    if header.quantizer == "qsvd":
        lines += ["import qsvd  # registers the quantization method with transformers", ""]
    lines.append(f"model = {architecture}.from_pretrained({path}){base}")
    if header.rank:
        lines.append(f'model = PeftModel.from_pretrained(model, {path}, subfolder="adapter"{adapter})')
    return lines


def _serve(header: ReportHeader, folder: str) -> str:
    merged = quote(folder + "-merged")
    convert = f"python convert_hf_to_gguf.py {merged} --outtype bf16  # llama.cpp, after merging"
    if header.quantizer == "qsvd":  # vLLM does not have the method
        return _code("Serve", "sh", [f"vllm serve {merged}  # after merging", convert])
    command = f"vllm serve {quote(folder)} --quantization bitsandbytes"
    if header.rank == 0:
        return _code("Serve", "sh", [command, convert])
    rank, adapter = vllm_rank(header.rank), quote(folder + "/adapter")
    command += f" --enable-lora --max-lora-rank {rank} --lora-modules principal={adapter}"
    note = "In requests to vLLM, name the model `principal`. The base model is only the residual."
    return f"{_code('Serve', 'sh', [command, convert])}\n\n{note}"


def _literal(text: str) -> str:
    """Return the text as a Python string in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _code(title: str, language: str, lines: list[str]) -> str:
    return "\n".join([f"## {title}\n\n```{language}", *lines, "```"])
