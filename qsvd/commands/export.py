"""`qsvd export`: a run in the form that PEFT, vLLM, llama.cpp and plain transformers load."""

import sys
import warnings
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from transformers import AutoConfig

from qsvd.adapters.head import classifier
from qsvd.checkpoint.export_folder import DiskTooSmall
from qsvd.checkpoint.export_lora import LoraExport, Target, write_lora
from qsvd.checkpoint.export_merged import MergedForm, write_merged
from qsvd.checkpoint.export_peft import write_peft
from qsvd.checkpoint.read import open_checkpoint
from qsvd.commands.check_export import check, fits, plain, with_adapter
from qsvd.commands.failures import DoesNotFit
from qsvd.commands.prepare import LEAST_SHARD
from qsvd.commands.quiet import quiet
from qsvd.commands.trained_model import Opened, open_trained
from qsvd.options import Export
from qsvd.plan.sizes import parse_size
from qsvd.report.readme import vllm_rank


def main(options: Export) -> None:
    """Export, check, and print what to do with the result."""
    shard_bytes = parse_size(options.shard_size, "--shard-size", least=LEAST_SHARD)
    opened = open_trained(options.run, options.base)
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)  # PEFT asks for an old name
        try:
            lines = _export(options, opened, dtype, shard_bytes)
        except DiskTooSmall as error:
            raise DoesNotFit(str(error)) from error
    print("\n".join([*lines, f"\n{options.out}"]))


def _export(options: Export, opened: Opened, dtype: torch.dtype | None, shard_bytes: int) -> list[str]:
    """Write and check; what to print."""
    if options.to == "peft":
        return _peft(options, opened, dtype or torch.float32)
    if options.to == "lora":
        return _lora(options, opened, dtype or torch.float32)
    return _merged(options, opened, MergedForm(dtype, shard_bytes, _config_changes(opened)))


def _peft(options: Export, opened: Opened, dtype: torch.dtype) -> list[str]:
    out, base = options.out.expanduser(), str(opened.split.folder)
    done = write_peft(opened.trained, out, base=base, task=opened.task, dtype=dtype)
    kind = "DoRA" if done.use_dora else "LoRA"
    lines = [f"{kind} of rank {done.rank} for {done.weights} weights, {done.num_bytes / 1e6:.1f} MB, for {base} only"]
    if _is_checked(options, opened):
        residual = plain(opened, lambda name: opened.split.residual(name).decode())
        lines.append(check(opened, with_adapter(residual, out), opened.load(), dtype).line("the trained model"))
    if done.use_dora and opened.task == "CAUSAL_LM":
        return [*lines, "vLLM and llama.cpp load no DoRA: export --to merged for them"]
    if opened.task != "CAUSAL_LM":
        return lines
    if opened.split.manifest["header"].get("quantizer", "bitsandbytes") == "qsvd":
        return [*lines, "mixed bits: import qsvd, then PEFT loads it; for vLLM and llama.cpp export --to merged"]
    return [
        *lines,
        f"vLLM: vllm serve {quote(base)} --quantization bitsandbytes {_vllm_flags(done.rank, options)}",
        "llama.cpp reads no bitsandbytes base: export --to merged for it",
    ]


def _lora(options: Export, opened: Opened, dtype: torch.dtype) -> list[str]:
    name = options.original or opened.split.manifest["source"]["model"]
    is_there = options.original is not None or Path(name).expanduser().is_dir()
    original = open_checkpoint(name) if is_there else None
    target = Target(name, opened.task, original, dtype)
    done = write_lora(opened.trained, options.out.expanduser(), target)
    lines = [
        f"LoRA of rank {done.rank} for {len(done.weights)} weights, {done.num_bytes / 1e6:.1f} MB, for {name}",
        _error(done),
    ]
    if original is None:
        lines.append(f"not checked by logits: {name} is not here; give --original")
    elif _is_checked(options, opened):
        expected = plain(opened, lambda weight: _on_original(opened, original, weight))
        exact = plain(opened, lambda weight: original.read(weight).float())
        found = check(opened, with_adapter(exact, options.out.expanduser()), expected, dtype)
        lines.append(found.line("the original with the trained change"))
    if opened.task != "CAUSAL_LM":
        return lines
    return [
        *lines,
        f"vLLM: vllm serve {quote(name)} {_vllm_flags(done.rank, options)}",
        f"llama.cpp: python convert_lora_to_gguf.py --base {quote(name)} {quote(str(options.out))}",
    ]


def _merged(options: Export, opened: Opened, form: MergedForm) -> list[str]:
    out = options.out.expanduser()
    done = write_merged(opened.trained, out, form)
    lines = [f"{done.weights} weights merged, {done.dtype}, {done.shards} files, {done.num_bytes / 1e6:.1f} MB"]
    if _is_checked(options, opened):
        model: Any = opened.load().transformers_class.from_pretrained(out, dtype=torch.float32)
        lines.append(check(opened, model.eval(), opened.load(), getattr(torch, done.dtype)).line("the trained model"))
    folder = quote(str(options.out))
    if opened.task == "CAUSAL_LM":
        lines += [f"vLLM: vllm serve {folder}", f"llama.cpp: python convert_hf_to_gguf.py {folder} --outtype bf16"]
    return lines


def _vllm_flags(rank: int, options: Export) -> str:
    return f"--enable-lora --max-lora-rank {vllm_rank(rank)} --lora-modules trained={quote(str(options.out))}"


def _error(done: LoraExport) -> str:
    how = "measured" if done.is_measured else "as qsvd quantize recorded it"
    return f"the original with this LoRA is not the trained model: relative error {done.relative_error:.4f}, {how}"


def _on_original(opened: Opened, original: Any, name: str) -> torch.Tensor:
    """W + (W' - Q - B0 A0), by its definition."""
    return original.read(name).float() + (opened.trained.dense(name) - opened.split.dense(name))


def _config_changes(opened: Opened) -> dict[str, Any]:
    """What config.json must say of a classifier."""
    labels = opened.record.labels
    if not labels:
        return {}
    config: Any = AutoConfig.from_pretrained(opened.split.folder, local_files_only=True)
    architecture = classifier(config, labels).__name__
    return {
        "architectures": [architecture],
        "id2label": {str(number): label for number, label in config.id2label.items()},
        "label2id": config.label2id,
        "problem_type": config.problem_type,
        "pad_token_id": config.pad_token_id,  # by which decoders find the end of a text
    }


def _is_checked(options: Export, opened: Opened) -> bool:
    if options.check and not fits(opened):
        print("not checked by logits: the model does not fit in memory as float32", file=sys.stderr)
        return False
    return options.check
