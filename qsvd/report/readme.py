"""OUT/README.md: what the folder is, and the commands to load, train, merge and serve it, ready to copy."""

import json
from shlex import quote

from qsvd.report.header import ReportHeader

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def readme(header: ReportHeader, folder: str, architecture: str) -> str:
    """The README of a result.

    Args:
        header: What was done.
        folder: Where the result is, as the user wrote it; the commands name it.
        architecture: Class name in transformers.
    """
    sections = [_opening(header), _load(header, folder, architecture)]
    if header.rank > 0:
        sections.append(_train(header, folder, architecture))
    sections.append(_merge(header, folder, architecture))
    if architecture.endswith("ForCausalLM"):
        sections.append(_serve(header, folder))
    return "\n\n".join(sections) + "\n"


def vllm_rank(rank: int) -> int:
    """The least --max-lora-rank of vLLM that a LoRA of this rank fits in."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), rank)


def _opening(header: ReportHeader) -> str:
    model = header.model.rstrip("/").rsplit("/", 1)[-1]
    is_plain = header.quantizer == "bitsandbytes"
    kind = "transformers 4-bit checkpoint" if is_plain else "transformers checkpoint of mixed bits"
    needs = "transformers, peft and bitsandbytes, not qsvd" if is_plain else "transformers, peft and qsvd"
    if header.rank == 0:
        parts = f"This folder is a {kind}; there is no adapter, since the rank is 0."
    else:
        parts = (
            f"This folder is a {kind} of the *residual* Q = W - B A, and `adapter/` a PEFT LoRA\n"
            "with the principal components B and A. The two belong together: Q alone is not the model, and the\n"
            "adapter fits no other base."
        )
    return (
        f"# {model}, split by qsvd\n\n{parts}\n\n{header.method}.\n{header.reach}.\n\n"
        "What quantization cost is in `report.md`, per weight in `errors.jsonl`; `qsvd.json` records the run.\n"
        f"The commands below need {needs}, and run where this path is valid;\n"
        "`qsvd train`, `qsvd eval` and `qsvd export` take the folder too."
    )


def _load(header: ReportHeader, folder: str, architecture: str) -> str:
    return _code("Load", "python", _loading(header, folder, architecture))


def _train(header: ReportHeader, folder: str, architecture: str) -> str:
    lines = _loading(header, folder, architecture, adapter=", is_trainable=True")
    return _code("Train", "python", [*lines, "model.print_trainable_parameters()"]) + (
        "\n\nGive `model` as it is to transformers' Trainer, or another that takes a PEFT model, without a\n"
        "`peft_config` of your own: nothing may initialize the adapter again. Principal components want a smaller\n"
        "learning rate than a LoRA that starts at zero."
    )


def _merge(header: ReportHeader, folder: str, architecture: str) -> str:
    lines = _loading(header, folder, architecture, base=".dequantize()")
    if header.rank > 0:
        lines.append("model = model.merge_and_unload()")
    lines.append(f"model.save_pretrained({_literal(folder + '-merged')}, save_original_format=False)")
    return _code("Merge into 16 bits", "python", lines)


def _loading(header: ReportHeader, folder: str, architecture: str, *, base: str = "", adapter: str = "") -> list[str]:
    """Lines that load the model; `base` follows the call for the residual, `adapter` ends the one for the factors."""
    path = _literal(folder)
    imports = [f"from transformers import {architecture}", ""]
    if header.quantizer == "qsvd":
        imports = [imports[0], "", "import qsvd  # registers the quantization method with transformers", ""]
    if header.rank:
        imports.insert(0, "from peft import PeftModel")
    loading = [f"model = {architecture}.from_pretrained({path}){base}"]
    if header.rank:
        loading.append(f'model = PeftModel.from_pretrained(model, {path}, subfolder="adapter"{adapter})')
    return [*imports, *loading]


def _serve(header: ReportHeader, folder: str) -> str:
    convert = f"python convert_hf_to_gguf.py {quote(folder + '-merged')} --outtype bf16  # llama.cpp, after merging"
    if header.quantizer == "qsvd":  # vLLM has no such method
        return _code("Serve", "sh", [f"vllm serve {quote(folder + '-merged')}  # after merging", convert])
    command = f"vllm serve {quote(folder)} --quantization bitsandbytes"
    if header.rank > 0:
        rank = vllm_rank(header.rank)
        command += f" --enable-lora --max-lora-rank {rank} --lora-modules principal={quote(folder + '/adapter')}"
    note = "\n\nAsk vLLM for the model `principal`, not for the base: the base is the residual." if header.rank else ""
    return _code("Serve", "sh", [command, convert]) + note


def _literal(text: str) -> str:
    """The text as a Python string in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _code(title: str, language: str, lines: list[str]) -> str:
    body = "\n".join(lines)
    return f"## {title}\n\n```{language}\n{body}\n```"
