"""OUT/README.md: what the folder holds, and commands to load, train, merge and serve it, ready to copy."""

from collections.abc import Mapping, Sequence
from typing import Any

from qsvd.errors import listing
from qsvd.report.card import code, literal, markdown, shell
from qsvd.report.header import ReportHeader
from qsvd.report.serving import COMPRESSED, PLUGIN, four_bit_line, joined_layers

BLOCK = 64  # bitsandbytes 0.50.2 on AVX-512 CPUs takes every row for whole blocks of this size
RESIDUAL = ', adapter_kwargs={"subfolder": "none"}'  # of from_pretrained: the model without the adapter next to it


def readme(  # each is known at another place
    header: ReportHeader,
    folder: str,
    architecture: str,
    quantization: Mapping[str, Any],
    widths: Mapping[str, int],
    table: str = "",
) -> str:
    """Return the README of a quantized model.

    Args:
        folder: Path of the quantized model as the user wrote it; the commands name it.
        architecture: Class name in transformers.
        quantization: The quantization_config of config.json.
        widths: In features of the quantized layers, by path.
        table: The errors, in Markdown; empty if none were measured.
    """
    opening = [_opening(header, quantization), *([f"## Quantization error\n\n{table}"] if table else [])]
    if _is_ours_alone(quantization):
        return _with_experts(folder, opening)
    odd = [path for path, width in widths.items() if width % BLOCK] if header.quantizer == "bitsandbytes" else []
    sections = [*opening, _code("Load", "python", _loading(header, folder, architecture))]
    if odd:
        sections.append(
            "On a CPU with AVX-512, bitsandbytes 0.50 decodes a weight wrongly if its input features do not divide by\n"
            f"{BLOCK}, and the outputs are wrong. Such layers here: {listing(odd, 2)}.\n"
            "Use `qsvd generate`, `qsvd.load` or the merged model there."
        )
    if header.rank > 0:
        lines = _loading(header, folder, architecture)
        train = f"model = PeftModel.from_pretrained(model, {literal(folder)}, is_trainable=True)"
        sections.append(
            _code("Train", "python", ["from peft import PeftModel", *lines, train])
            + "\n\nThis trains the stored components; PEFT makes no second copy of them. Give `model` to one of TRL's\n"
            "trainers, or to another trainer that takes a PEFT model. Do not give the trainer a `peft_config`: it\n"
            "replaces the components by a new LoRA, and the outputs are wrong. Use a smaller learning rate than for a\n"
            "LoRA that starts at zero."
        )
    needs_qsvd = bool(odd) or header.quantizer == COMPRESSED  # whose dense weights keep its config in transformers
    sections.append(_merge(header, folder, architecture, needs_qsvd=needs_qsvd))
    if architecture.endswith("ForCausalLM"):
        sections.append(_serve(header, folder, quantization, [*widths]))
    return "\n\n".join(sections) + "\n"


def _is_ours_alone(quantization: Mapping[str, Any]) -> bool:
    """Tell whether qsvd alone can load the model: because of its experts, or of experts that PEFT sees elsewhere."""
    return "experts" in quantization or "misplaced" in quantization


def _with_experts(folder: str, opening: Sequence[str]) -> str:
    """Return the README of a model with experts that qsvd alone can load."""
    load = ["import qsvd", "", f"model = qsvd.load({literal(folder)})"]
    data = f"qsvd train {shell(folder)} DATA --out {shell(folder + '-run')}"
    merge = f"qsvd export {shell(folder)} --to merged --out {shell(folder + '-merged')}"
    sections = [*opening, _code("Load", "python", load), _code("Train", "sh", [data])]
    sections += [_code("Merge into a 16-bit model", "sh", [merge]), _code("Serve", "sh", _merged_lines(folder))]
    return "\n\n".join(sections) + "\n"


def _merge(header: ReportHeader, folder: str, architecture: str, *, needs_qsvd: bool) -> str:
    """Return how to merge; by qsvd where other libraries cannot, or bitsandbytes may decode wrongly (see BLOCK)."""
    title = "Merge into a 16-bit model"
    if needs_qsvd:
        return _code(title, "sh", [f"qsvd export {shell(folder)} --to merged --out {shell(folder + '-merged')}"])
    lines = [
        *(["from peft import PeftModel"] if header.rank > 0 else []),
        *_loading(header, folder, architecture, RESIDUAL if header.rank > 0 else ""),
        "model = model.dequantize()",
        *([f"model = PeftModel.from_pretrained(model, {literal(folder)}).merge_and_unload()"] if header.rank else []),
        f"model.save_pretrained({literal(folder + '-merged')}, save_original_format=False)",
    ]
    return _code(title, "python", lines)


def _opening(header: ReportHeader, quantization: Mapping[str, Any]) -> str:
    model = header.model.rstrip("/").rsplit("/", 1)[-1]
    kind = "mixed-precision checkpoint" if header.quantizer == "qsvd" else "4-bit checkpoint"
    libraries = ["transformers", *(["peft"] if header.rank else []), header.quantizer]
    if _is_ours_alone(quantization):
        libraries = ["qsvd"]
    if "misplaced" in quantization:
        parts = (
            "This folder holds a quantized model that only qsvd can open: PEFT would put the components of\n"
            f"{listing(quantization['misplaced'])}\n"
            "on the experts, since their names are similar. transformers, PEFT and vLLM refuse it; they load the\n"
            "merged model. Quantized with `--rank 0`, or without these layers (`--exclude`), it opens with\n"
            "transformers."
        )
    elif "experts" in quantization:
        parts = (
            "This folder holds a quantized model with quantized experts, which only qsvd can run. transformers,\n"
            "PEFT and vLLM refuse it; they load the merged model."
        )
    elif header.rank == 0:
        parts = (
            f"This folder holds a quantized model as a transformers {kind}. It has no adapter, because the rank is 0."
        )
    else:
        parts = (
            f"This folder holds the quantized residual Q of each layer as a transformers {kind}, and next to\n"
            "it the components B and A in 16 bits as a PEFT LoRA adapter (W ≈ Q + B A). transformers loads both. The\n"
            "residual without the adapter gives wrong outputs, and the adapter works with no other model."
        )
    needed = " and ".join(filter(None, [", ".join(libraries[:-1]), libraries[-1]]))
    kept = f" {header.kept}" if header.kept else ""
    return (
        f"# {markdown(model)}, quantized by qsvd\n\n{parts}\n\n{header.method}.\n{header.reach}.{kept}\n\n"
        "`report.md` lists the quantization error, `errors.jsonl` the error of every layer, `qsvd.json` the options.\n"
        f"The commands below need {needed}. Edit the path if it moves.\n"
        "`qsvd train`, `qsvd eval` and `qsvd export` take this folder too."
    )


def _loading(header: ReportHeader, folder: str, architecture: str, more: str = "") -> list[str]:
    """Return lines that load the model; `more` is a further argument of from_pretrained."""
    lines = [f"from transformers import {architecture}", ""]
    if header.quantizer == "qsvd":
        lines += ["import qsvd  # registers the quantization method with transformers", ""]
    return [*lines, f"model = {architecture}.from_pretrained({literal(folder)}{more})"]


def _serve(header: ReportHeader, folder: str, quantization: Mapping[str, Any], modules: Sequence[str]) -> str:
    after = _merged_lines(folder)
    if header.quantizer == "qsvd":  # vLLM does not have the method
        return _code("Serve", "sh", after)
    is_compressed = header.quantizer == COMPRESSED
    _, parted = joined_layers(quantization["ignore" if is_compressed else "llm_int8_skip_modules"], modules)
    if parted:
        why = "would quantize the 16-bit part of\n{} while it loads this folder."
        if is_compressed:
            why = "refuses this folder, since parts of\n{} are quantized and others are not."
        return f"{_code('Serve', 'sh', after)}\n\nServe the merged model: vLLM {why.format(listing(parted))}"
    before = [] if is_compressed else [PLUGIN]
    if header.rank == 0:
        return _code("Serve", "sh", [*before, f"vllm serve {shell(folder)} --dtype bfloat16", *after])
    name = header.model.rstrip("/").rsplit("/", 1)[-1]
    command = four_bit_line(folder, name, folder, header.rank, quantization)
    note = (
        f"In requests to vLLM, name the model {code(name)}. "
        "The model `residual-only` is the residual alone: its outputs\nare wrong. "
    )
    if is_compressed:
        note += "Do not serve the folder without the options for the adapter: the outputs are wrong."
    else:
        note += "Without `--hf-overrides` vLLM refuses the folder, because it would serve the residual alone."
    return f"{_code('Serve', 'sh', [*before, command, *after])}\n\n{note}"


def _merged_lines(folder: str) -> list[str]:
    merged = shell(folder + "-merged")
    return [
        f"vllm serve {merged}  # after merging; also on several GPUs",
        f"python convert_hf_to_gguf.py {merged} --outtype bf16  # llama.cpp, after merging",
    ]


def _code(title: str, language: str, lines: list[str]) -> str:
    return "\n".join([f"## {title}\n\n```{language}", *lines, "```"])
