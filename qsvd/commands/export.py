"""`qsvd export`: write a run in the form that PEFT, vLLM, llama.cpp and plain transformers load, and check it."""

import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qsvd.adapters.methods.table import export_refusal
from qsvd.console.progress import display, quiet, say
from qsvd.errors import BadInput, parse_size
from qsvd.export.compressed import CompressedExport, CompressedForm, write_compressed, written_weight
from qsvd.export.hub import named_base, open_repository, upload, uploaded_name
from qsvd.export.lora import Target, trained_experts, write_lora
from qsvd.export.merged import MergedForm, write_merged
from qsvd.export.peft import PeftExport, write_peft
from qsvd.export.recovered import write_recovered
from qsvd.export.trained import Trained, naming_damage
from qsvd.files.atomic import read_object, write_text
from qsvd.files.source import open_checkpoint
from qsvd.files.workspace import CHAT_TEMPLATE
from qsvd.inputs.model_files import MODEL, from_folder
from qsvd.inputs.paths import hub_id
from qsvd.options import Export
from qsvd.prepare.check_options import LEAST_SHARD
from qsvd.prepare.models import Opened, open_trained
from qsvd.prepare.using.export import Recovery, find_recovery, from_transformers, recovered
from qsvd.prepare.using.logits import check, fits, plain, with_adapter
from qsvd.records import Progress, ShowProgress, show_nothing
from qsvd.report.card import card_header, origin_of, shell
from qsvd.report.next_commands import after_export, last_lines
from qsvd.report.results import ExportResult
from qsvd.report.serving import COMPRESSED, PLUGIN, compressed_serving, four_bit_line, lora_flags

PASSES = {"peft": 2, "lora": 2, "merged": 2, COMPRESSED: 2}  # over all weights: checked, then written
CHECKS = {"peft": 1, "lora": 2, "merged": 1, COMPRESSED: 1}  # more passes, to compare logits
WHAT = {"peft": "an adapter", "lora": "a LoRA", "merged": "a 16-bit model", COMPRESSED: "a model of 4-bit weights"}


def main(options: Export) -> None:
    """Run `qsvd export`: 1 write, 2 check by logits, 3 print how to use the export."""
    with display() as show:
        opened, done, repository = _export(options, show)
    say("\n".join([*done.lines, f"\n{options.out}"]))
    original = options.original or opened.split.manifest["source"]["model"]
    models = {"lora": original, "peft": str(opened.split.folder), COMPRESSED: str(options.run)}
    found = after_export(
        options.to,
        options.out,
        models.get(options.to, ""),
        task=opened.task,
        has_components=any(opened.split.ranks.values()),
    )
    say(last_lines(WHAT[options.to], options.out, found), file=sys.stderr)
    if repository is not None:
        say(_push(options, opened, repository))


def export(options: Export, show: ShowProgress = show_nothing) -> ExportResult:
    """Write, check and upload an export as `qsvd export` does, silently.

    Raises:
        BadInput: an option or the run cannot be used, or the export does not compute what was trained.
        DoesNotFit: the files do not fit on the disk.
    """
    opened, done, repository = _export(options, show)
    return done if repository is None else replace(done, url=_push(options, opened, repository))


def _export(options: Export, show: ShowProgress) -> tuple[Opened, ExportResult, str | None]:
    """Write and check an export; return what was exported, the result, and the repository to upload to."""
    shard_bytes = parse_size(options.shard_size, "--shard-size", least=LEAST_SHARD)
    opened = open_trained(options.run, options.base)
    if refusal := export_refusal(opened.record.method, options.to):
        raise BadInput(refusal)
    if options.to == "lora" and opened.trained_experts:
        raise trained_experts(opened.trained_experts)
    repository = open_repository(options)
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    recovery = find_recovery(opened, options.original)
    is_checked = options.check and fits(opened, recovery.elements if recovery else 0)
    opened = counted(opened, PASSES[options.to] + (CHECKS[options.to] if is_checked else 0), show)
    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)  # PEFT asks for an old name
        form = MergedForm(dtype, shard_bytes, opened.config_changes if options.to in ("merged", COMPRESSED) else {})
        if recovery is not None and options.to in ("lora", "merged"):
            done = _recovered(options, opened, form, recovery, is_checked)
        else:
            done = _written_as(options, opened, form, is_checked)
    if opened.adapter is not None and opened.adapter.chat_template is not None:
        write_text(options.out.expanduser() / CHAT_TEMPLATE, opened.adapter.chat_template)
    if options.check and not is_checked:
        unchecked = "not checked by logits: the model does not fit in memory as float32"
        done = replace(done, lines=(*done.lines, unchecked))
    return opened, done, repository


def _written_as(options: Export, opened: Opened, form: MergedForm, is_checked: bool) -> ExportResult:
    match options.to:
        case "peft":
            return _peft(options, opened, form.dtype or torch.float32, is_checked)
        case "lora":
            return _lora(options, opened, form.dtype or torch.float32, is_checked)
        case "merged":
            return _merged(options, opened, form, is_checked)
    packed = CompressedForm(opened.task, form.dtype, form.shard_bytes, form.config_changes)
    return _compressed(options, opened, packed, is_checked)


def _push(options: Export, opened: Opened, name: str) -> str:
    """Upload an export with a card. Return the address of the repository."""
    split, out = opened.split, options.out.expanduser()
    source = split.manifest["source"]
    original, base = hub_id(source["model"], source["revision"]), uploaded_name(split.folder)
    replaced = {}
    if options.to == "peft":
        replaced = named_base(out, base)
        if base is None:
            say(
                f"adapter_config.json names the quantized model by its path, {split.folder}, because its name on the "
                "Hub is not known: upload it with qsvd quantize --push-to-hub NAME, then run this command again",
                file=sys.stderr,
            )
    origin = origin_of(split.folder, base or original if options.to == "peft" else original, source["architecture"])
    library = "peft" if options.to in ("peft", "lora") else "transformers"
    relation = "adapter" if library == "peft" else "finetune" if options.to == "merged" else "quantized"
    words = {
        "peft": f"A PEFT adapter for the quantized model {base or split.folder.name}. It works with no other model.",
        "lora": f"A LoRA for the 16-bit model {original or Path(source['model']).name}.",
        "merged": "A 16-bit model: the quantized weights and the trained adapter, merged.",
        COMPRESSED: "A model with weights of 4 bits in the format of compressed-tensors.",
    }
    text = f"# {name.rpartition('/')[2]}\n\n{words[options.to]} Written by `qsvd export --to {options.to}`.\n"
    return upload(out, name, replaced | {"README.md": card_header(origin, relation, library, [options.to]) + text})


def counted(opened: Opened, passes: int, show: ShowProgress) -> Opened:
    """Return the same model; it shows progress when a weight is read.

    Args:
        passes: How often all weights are read, one after the other.
    """
    each, read, last = len(opened.split.weights), 0, ""

    def weight(name: str) -> Trained:
        nonlocal read, last
        found = opened.trained.weight(name)
        if name != last and read < passes * each:  # a weight may be read twice in one pass
            read, last = read + 1, name
            what = f"pass {(read - 1) // each + 1} of {passes}, {(read - 1) % each + 1}/{each} weights"
            show(Progress(read, read, passes * each, what))
        return found

    return replace(opened, trained=replace(opened.trained, weight=weight))


def _peft(options: Export, opened: Opened, dtype: torch.dtype, is_checked: bool) -> ExportResult:
    out, base, checked = options.out.expanduser(), str(opened.split.folder), None
    done = write_peft(opened.trained, out, base=base, task=opened.task, dtype=dtype)
    kind = "DoRA" if done.use_dora else "LoRA"
    lines = [f"{kind} of rank {done.rank} for {done.weights} weights, {done.num_bytes / 1e6:.1f} MB, for {base} only"]
    if is_checked:
        residual = plain(opened, lambda name: opened.split.residual(name).decode())
        with naming_damage(out):
            checked = check(opened, with_adapter(residual, out), opened.load(), dtype)
            lines.append(checked.line("the trained model"))
    return ExportResult(out, done.num_bytes, checked, (*lines, *_peft_serving(options, opened, done)))


def _peft_serving(options: Export, opened: Opened, done: PeftExport) -> list[str]:
    """Return how other programs load the adapter."""
    if opened.task != "CAUSAL_LM":
        return []
    if done.use_dora:
        return ["vLLM and llama.cpp do not load DoRA: use --to merged for them"]
    if opened.split.manifest["header"].get("quantizer", "bitsandbytes") == "qsvd":
        return ["mixed bits: PEFT loads it after import qsvd; use --to merged for vLLM and llama.cpp"]
    quantization = read_object(opened.split.folder / "config.json")["quantization_config"]
    is_compressed = quantization["quant_method"] == COMPRESSED
    return [
        *([] if is_compressed else [f"vLLM: {PLUGIN}"]),
        four_bit_line(str(opened.split.folder), "trained", str(options.out), done.rank, quantization),
        "in requests, name the model trained; the model residual-only gives wrong outputs",
        f"llama.cpp does not read {quantization['quant_method']} models: use --to merged for it",
    ]


def _lora(options: Export, opened: Opened, dtype: torch.dtype, is_checked: bool) -> ExportResult:
    out, name, checked = options.out.expanduser(), options.original or opened.split.manifest["source"]["model"], None
    is_there = options.original is not None or Path(name).expanduser().is_dir()
    original = open_checkpoint(name) if is_there else None
    done = write_lora(opened.trained, out, Target(name, opened.task, original, dtype))
    lines = [
        f"LoRA of rank {done.rank} for {len(done.weights)} weights, {done.num_bytes / 1e6:.1f} MB, for {name}",
        done.line,
    ]
    if original is None:
        lines.append(f"not checked by logits: {name} is not on this machine; give --original")
    elif is_checked:
        expected = plain(opened, partial(opened.trained.on_original, original))
        if any("stack" in weight for weight in opened.split.weights.values()):
            exact = from_transformers(opened, original.folder or Path(name))
        else:
            exact = plain(opened, lambda weight: opened.trained.original_weight(original, weight).float())
        with naming_damage(out):
            checked = check(opened, with_adapter(exact, out), expected, dtype)
            lines.append(checked.line("the original with the trained change"))
    if opened.task == "CAUSAL_LM":
        lines += [
            f"vLLM: vllm serve {shell(name)} {lora_flags('trained', str(options.out), done.rank)}",
            f"llama.cpp: python convert_lora_to_gguf.py --base {shell(name)} {shell(str(options.out))}",
        ]
    return ExportResult(out, done.num_bytes, checked, tuple(lines))


def _recovered(options: Export, opened: Opened, form: MergedForm, recovery: Recovery, is_checked: bool) -> ExportResult:
    """Write what was trained on a pruned model for the model that it was made from."""
    out, original, checked = options.out.expanduser(), recovery.original, None
    if options.to == "lora":
        dtype = form.dtype or torch.float32
        target = Target(original.name, opened.task, None, dtype, recovery.pruned)
        lora = write_lora(opened.trained, out, target)
        num_bytes, what = lora.num_bytes, f"LoRA of rank {lora.rank} for {len(lora.weights)} weights"
    else:
        merged = write_recovered(opened.trained, out, form, original, recovery.pruned)
        num_bytes, what, dtype = merged.num_bytes, f"{merged.weights} weights merged", getattr(torch, merged.dtype)
    lines = [f"{what}, {num_bytes / 1e6:.1f} MB, for {original.name}; zero at the channels that qsvd prune removed"]
    if is_checked:
        expected, folder = recovered(opened, recovery), original.folder or Path(original.name)
        with naming_damage(out):
            if options.to == "lora":
                candidate = with_adapter(from_transformers(opened, folder), out)
            else:
                candidate = from_folder(type(expected), out, MODEL, dtype=torch.float32).eval()
            checked = check(opened, candidate, expected, dtype)
            lines.append(checked.line("the original with the trained change").partition(";")[0])
    return ExportResult(out, num_bytes, checked, tuple(lines))


def _merged(options: Export, opened: Opened, form: MergedForm, is_checked: bool) -> ExportResult:
    out, checked = options.out.expanduser(), None
    done = write_merged(opened.trained, out, form)
    lines = [f"{done.weights} weights merged, {done.dtype}, {done.num_bytes / 1e6:.1f} MB of weights"]
    if is_checked:
        with naming_damage(out):
            model: Any = from_folder(opened.load().transformers_class, out, MODEL, dtype=torch.float32)
            checked = check(opened, model.eval(), opened.load(), getattr(torch, done.dtype))
            lines.append(checked.line("the trained model"))
    folder = shell(str(options.out))
    if opened.task == "CAUSAL_LM":
        lines += [f"vLLM: vllm serve {folder}", f"llama.cpp: python convert_hf_to_gguf.py {folder} --outtype bf16"]
    return ExportResult(out, done.num_bytes, checked, tuple(lines))


def _compressed(options: Export, opened: Opened, form: CompressedForm, is_checked: bool) -> ExportResult:
    out, checked = options.out.expanduser(), None
    done = write_compressed(opened.trained, out, form)
    lines = done.lines
    if is_checked:
        with naming_damage(out):
            model: Any = from_folder(opened.load().transformers_class, out, MODEL, dtype=torch.float32)
            written = opened.load() if done.rank else plain(opened, lambda name: _written(opened, out, done, name))
            checked = check(opened, model.eval(), written, form.dtype or torch.bfloat16)
            lines.append(checked.line("the weights as they were written"))
    if opened.task == "CAUSAL_LM":
        lines += compressed_serving(str(options.out), done.rank)
    return ExportResult(out, done.num_bytes, checked, tuple(lines))


def _written(opened: Opened, out: Path, done: CompressedExport, name: str) -> Tensor:
    """Return a weight as an export has it: decoded, or merged if it stays in 16 bits."""
    rows, columns = opened.split.weights[name]["shape"]
    found = written_weight(out, name, (rows, columns), done.group)
    return opened.trained.dense(name) if found is None else found
