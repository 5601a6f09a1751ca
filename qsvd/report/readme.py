"""OUT/README.md: what the folder is, and the commands to load, train, merge and serve it, ready to copy."""

from qsvd.report.header import Header

AUTO_CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
}
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def readme(header: Header, folder: str, architecture: str) -> str:
    """The README of a result.

    Args:
        header: What was done.
        folder: Where the result is, as the user wrote it; the commands name it.
        architecture: Class name in transformers.
    """
    auto = next((auto for ending, auto in AUTO_CLASSES.items() if architecture.endswith(ending)), "AutoModel")
    sections = [_opening(header), _load(header, folder, auto)]
    if header.rank > 0:
        sections.append(_train(folder, auto))
    sections.append(_merge(header, folder, auto))
    if auto == "AutoModelForCausalLM":
        sections.append(_serve(header, folder))
    return "\n\n".join(sections) + "\n"


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
        "The commands below need transformers, peft and bitsandbytes, not qsvd, and run where this path is valid."
    )


def _load(header: Header, folder: str, auto: str) -> str:
    lines = [f"from transformers import {auto}", "", f'model = {auto}.from_pretrained("{folder}")']
    if header.rank > 0:
        lines.insert(0, "from peft import PeftModel")
        lines.append(f'model = PeftModel.from_pretrained(model, "{folder}", subfolder="adapter")')
    return _code("Load", "python", lines)


def _train(folder: str, auto: str) -> str:
    lines = [
        "from peft import PeftModel",
        f"from transformers import {auto}",
        "",
        f'model = {auto}.from_pretrained("{folder}")',
        f'model = PeftModel.from_pretrained(model, "{folder}", subfolder="adapter", is_trainable=True)',
        "model.print_trainable_parameters()",
    ]
    return _code("Train", "python", lines) + (
        "\n\nGive `model` as it is to transformers' Trainer or another that takes a PEFT model, without a `peft_config`\n"
        "of your own: nothing may initialize the adapter again. Principal components want a smaller learning rate than\n"
        "a LoRA that starts at zero."
    )


def _merge(header: Header, folder: str, auto: str) -> str:
    lines = [f"from transformers import {auto}", "", f'model = {auto}.from_pretrained("{folder}").dequantize()']
    if header.rank > 0:
        lines.insert(0, "from peft import PeftModel")
        lines.append(f'model = PeftModel.from_pretrained(model, "{folder}", subfolder="adapter").merge_and_unload()')
    lines.append(f'model.save_pretrained("{folder}-merged", save_original_format=False)')
    return _code("Merge into 16 bits", "python", lines)


def _serve(header: Header, folder: str) -> str:
    command = f"vllm serve {folder} --quantization bitsandbytes"
    if header.rank > 0:
        rank = next((rank for rank in VLLM_RANKS if rank >= header.rank), header.rank)
        command += f" --enable-lora --max-lora-rank {rank} --lora-modules principal={folder}/adapter"
    lines = [command, f"python convert_hf_to_gguf.py {folder}-merged --outtype bf16  # llama.cpp, after merging"]
    note = "\n\nAsk vLLM for the model `principal`, not for the base: the base is the residual." if header.rank else ""
    return _code("Serve", "sh", lines) + note


def _code(title: str, language: str, lines: list[str]) -> str:
    body = "\n".join(lines)
    return f"## {title}\n\n```{language}\n{body}\n```"
