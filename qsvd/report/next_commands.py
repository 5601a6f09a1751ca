"""The last lines of a command: what was written, its size, and the commands that come next, to copy."""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from qsvd.errors import one_line, show_size
from qsvd.files.workspace import ADAPTER_CONFIG
from qsvd.options import Allocate, Calibrate, Compare, Prune, Train
from qsvd.ranks import local_size, size
from qsvd.report.card import shell
from qsvd.report.readme import RESIDUAL
from qsvd.report.serving import COMPRESSED

DATA = "DATA  # DATA: a file of examples, or a Hub id"


def last_lines(what: str, path: Path, commands: Sequence[str] = ()) -> str:
    """Return "Done: OUT, a quantized model, 531 MB in 12 files", and a line for each command.

    Args:
        what: "a quantized model".
        path: A file or folder, as the user wrote it.
    """
    place = path.expanduser()
    files = [file for file in place.rglob("*") if file.is_file()] if place.is_dir() else [place]
    size = show_size(sum(file.stat().st_size for file in files))
    count = f" in {len(files):,} files" if place.is_dir() else ""
    return "\n".join([f"Done: {one_line(path)}, {what}, {size}{count}", *(f"Next: {command}" for command in commands)])


def after_quantize(out: Path) -> list[str]:
    """Return the command that trains a quantized model."""
    return [f"qsvd train {shell(str(out))} --out {shell(f'{out}-run')} {DATA}"]


def after_prune(options: Prune) -> list[str]:
    """Return the commands that train on a pruned model, and that write the LoRA for the model it was made from."""
    out = str(options.out)
    quantize = shell("qsvd", "quantize", out, "--out", f"{out}-quantized", "--rank", "0")
    train = ["qsvd", "train", f"{out}-quantized", "--method", "lora", "--out", f"{out}-run"]
    export = ["qsvd", "export", f"{out}-run", "--to", "lora", "--original", options.model, "--out", f"{out}-lora"]
    return [quantize, f"{shell(*train)} {DATA}", shell(*export)]


def after_calibrate(options: Calibrate) -> list[str]:
    """Return the command that trains from the gradients, if there are some, and the one that quantizes."""
    train = ["qsvd", "train", options.model, options.data, "--out", f"{Path(options.model).name}-run"]
    train += ["--method", "lora-ga", "--rank", str(options.gradient_rank), "--gradients", str(options.out)]
    name = f"{Path(options.model).name}-quantized"
    words = ["qsvd", "quantize", options.model, "--out", name, "--budget", "2.75bits", "--objective", "fisher"]
    quantize = shell(*words, "--statistics", str(options.out), *_layers(options))
    return [quantize] if options.gradient_rank is None else [shell(*train), quantize]


TEXTS = ("calibrate", "sensitivity", "examples", "max_length", "map", "split", "seed")  # options of --calibrate


def after_allocate(options: Allocate) -> list[str]:
    """Return the command that quantizes by the table."""
    name = f"{Path(options.model).name}-quantized"
    words = ["qsvd", "quantize", options.model, "--out", name, "--allocation", str(options.out)]
    if options.objective == "fisher":
        words += ["--objective", "fisher", "--statistics", str(options.statistics)]
    if options.calibrate is not None:
        words += _flags(options, [field.name for field in fields(options) if field.name not in TEXTS])
    return [shell(*words, *_layers(options))]


def _layers(options: Calibrate | Allocate) -> list[str]:
    include = ["--include", *options.include] if options.include else []
    towers = ["--include-towers"] if options.include_towers else []
    return include + (["--exclude", *options.exclude] if options.exclude else []) + towers


def train_command(options: Train) -> str:
    """Return the command line of a run, with the options that are not at their defaults; "DATA" stands for no data.

    It starts as many processes as there are here.
    """
    start = ["torchrun", "--nproc-per-node", str(local_size()), "-m"] if size() > 1 else []
    words = [*start, "qsvd", "train", options.base, options.data, "--out", str(options.out)]
    words += _flags(options, ("base", "data", "out", "preview", "dry_run"))
    return shell(*words) + (f"  {DATA.partition('  ')[2]}" if options.data == "DATA" else "")


def compare_command(options: Compare) -> str:
    """Return the command line of a comparison in DIR, with the options that are not at their defaults."""
    words = ["qsvd", "compare", options.model, options.data, "--out", "DIR"]
    return shell(*words, *_flags(options, ("model", "data", "out", "keep_runs", "dry_run")))


def _flags(options: Train | Compare | Allocate, left_out: Sequence[str]) -> list[str]:
    """Return the options that are not at their defaults as words of a command line."""
    words = []
    for field in fields(options):
        value, flag = getattr(options, field.name), field.name.replace("_", "-")
        if field.name in left_out or value == field.default:
            continue
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def repeating_command(options: Train) -> str:
    """Return the command line of a run without what does not belong to a repeat: --resume, an upload."""
    return train_command(replace(options, resume=False, push_to_hub=None, public=False))


def after_train(base: str, run: Path, valid: str | None, *, generates: bool, merges: bool) -> list[str]:
    """Return the commands that use a run.

    Args:
        valid: Validation data, if there are some besides the training data.
        generates: Whether it is a language model.
        merges: Whether its method can be exported as merged weights.
    """
    commands = [shell("qsvd", "generate", str(run), "--prompt", "Hello")] if generates else []
    if valid is not None:
        models = [base, str(run)] if generates else [str(run)]
        commands.append(shell("qsvd", "eval", *models, "--data", valid))
    elif not generates:
        commands.append(f"{shell('qsvd', 'eval', str(run), '--data')} {DATA}")
    merged = shell("qsvd", "export", str(run), "--to", "merged", "--out", f"{run}-merged")
    return [*commands, merged] if merges else commands


def after_export(form: str, out: Path, base: str, *, task: str | None, has_components: bool) -> list[str]:
    """Return the line that loads or serves an export.

    Args:
        form: --to.
        base: The model that an adapter is for; for compressed-tensors, what was exported.
        task: PEFT's name of it, "CAUSAL_LM"; None where a model only encodes.
        has_components: Whether the quantized model that a PEFT adapter is for has an adapter of its own.
    """
    if form == "merged":
        return [_uses_merged(out, task)]
    if task != "CAUSAL_LM":
        return []
    if form == COMPRESSED:
        has_adapter = (out.expanduser() / ADAPTER_CONFIG).is_file()  # then both compute the same
        models = shell("qsvd", "eval", base, *([] if has_adapter else [str(out)]))
        return [f"{models} --reference MODEL16 --data {DATA}; MODEL16: the 16-bit model"]
    more = RESIDUAL if form == "peft" and has_components else ""
    load = f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}{more}), {str(out)!r})"
    return [f"(Python) from peft import PeftModel; from transformers import AutoModelForCausalLM; model = {load}"]


def _uses_merged(out: Path, task: str | None) -> str:
    """Return the line that uses a 16-bit model."""
    if task == "CAUSAL_LM":
        return shell("qsvd", "generate", str(out), "--prompt", "Hello")
    if task == "SEQ_CLS":
        use = f"pipeline('text-classification', {str(out)!r})('Hello')"
        return f"(Python) from transformers import pipeline; print({use})"
    return f"(Python) from transformers import AutoModel; model = AutoModel.from_pretrained({str(out)!r})"
