"""The files around the shards: adapter, configs, tokenizer, error records, report, README and, last, the manifest."""

import json
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from rich.console import Console
from rich.table import Table

import qsvd
from qsvd.export.peft import adapter_settings
from qsvd.files.atomic import whole_file, write_json, write_text
from qsvd.files.layout import fingerprint, packed_config, quantization_config
from qsvd.files.output import OutputFolder
from qsvd.files.safetensors import read_header
from qsvd.files.workspace import ERRORS, MANIFEST
from qsvd.numerics.names import spelling
from qsvd.prepare.quantize import ALLOCATION, Job
from qsvd.report.errors import from_record, to_markdown, to_record
from qsvd.report.readme import readme

FORMAT = 1
LIBRARIES = ("torch", "bitsandbytes", "transformers", "peft", "safetensors")
TASKS = {  # PEFT's task_type; for classifiers none, since PEFT would look for a head among the factors
    "ForCausalLM": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


def finish(job: Job, folder: OutputFolder) -> None:
    """Write what belongs to a complete result, then drop the folder of unfinished work. May be run again.

    A weight whose record is null was drawn, not split: it has no error, and the report says so.
    """
    digests = {spec.name: folder.residual_sha256(number) for number, spec in enumerate(job.source.plan.weights)}
    base = fingerprint(digests)
    records = [folder.weight_record(number) for number in range(len(job.source.plan.weights))]
    errors = [from_record(record) for record in records if record is not None]
    if any(choice.rank for choice in job.allocation.choices.values()):
        _write_adapter(job, folder, base)
    _write_config(job)
    _write_index(job)
    for source in job.source.checkpoint.other_files:
        with whole_file(job.source.out / source.name) as file:
            file.write(source.read_bytes())
    write_text(job.source.out / ERRORS, "".join(f"{json.dumps(to_record(error))}\n" for error in errors))
    write_text(job.source.out / "report.md", to_markdown(job.header, errors) if errors else _unmeasured(job))
    if job.text is not None:
        write_text(job.source.out / ALLOCATION, job.text)
    write_text(job.source.out / "README.md", readme(job.header, str(job.source.out), job.source.plan.architecture))
    write_json(job.source.out / MANIFEST, _manifest(job, digests, base))
    folder.close()


def _write_adapter(job: Job, folder: OutputFolder, base: str) -> None:
    metadata = {"qsvd_base_fingerprint": base}
    folder.write_adapter("adapter/adapter_model.safetensors", range(len(job.source.plan.weights)), metadata)
    task = next((task for ending, task in TASKS.items() if job.source.plan.architecture.endswith(ending)), None)
    ranks = {module: choice.rank for module, choice in job.allocation.choices.items() if choice.rank}
    config = adapter_settings(ranks, (), task, str(job.source.out))
    write_json(job.source.out / "adapter" / "adapter_config.json", config)


def _write_config(job: Job) -> None:
    """The source's config.json as it is, with the quantization added."""
    dtype = job.source.compute_dtype
    if job.allocation.is_plain:
        nested = job.header.codec == "nf4+dq"
        quantization = quantization_config(list(job.skipped), double_quant=nested, dtype=dtype)
    else:
        quantization = packed_config(job.allocation, dtype)
    config = job.source.checkpoint.config_json | {"quantization_config": quantization}
    write_json(job.source.out / "config.json", config)


def _write_index(job: Job) -> None:
    if len(job.shards) == 1:
        return
    headers = {shard.file: read_header(job.source.out / shard.file) for shard in job.shards}
    weight_map = {name: file for file, header in headers.items() for name in header.tensors}
    total = sum(entry.num_bytes for header in headers.values() for entry in header.tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(job.source.out / "model.safetensors.index.json", index)


def _unmeasured(job: Job) -> str:
    return f"# {job.header.model}\n\n{job.header.method}.\n\nNo weight was split, so no error was measured.\n"


def _manifest(job: Job, digests: dict[str, str], base: str) -> dict[str, Any]:
    file_of = {number: shard.file for shard in job.shards for number in shard.weights}
    weights = {
        spec.name: {
            "module": spec.module,
            "shape": list(spec.shape),
            "role": spec.role,
            "codec": spelling(job.allocation.choices[spec.module].codec),
            "rank": job.allocation.choices[spec.module].rank,
            "file": file_of[number],
            "residual_sha256": digests[spec.name],
        }
        for number, spec in enumerate(job.source.plan.weights)
    }
    checkpoint = job.source.checkpoint
    return {
        "format": FORMAT,
        "fingerprint": base,
        "source": {
            "model": checkpoint.name,
            "revision": checkpoint.revision,
            "fingerprint": checkpoint.fingerprint,
            "architecture": job.source.plan.architecture,
        },
        "run": job.source.identity,
        "versions": {"qsvd": qsvd.__version__} | {name: version(name) for name in LIBRARIES},
        "header": asdict(job.header),
        "weights": weights,
    }


# What `qsvd quantize --dry-run` prints: the resolved options, the weights and the expected sizes.


def show_plan(job: Job) -> None:
    """Print the plan of a job to stdout."""
    console = Console()
    options = Table("option", "value", title="Options", title_justify="left")
    for name, value in asdict(job.source.options).items():
        options.add_row(f"--{name.replace('_', '-')}", str(value))
    options.add_row("(device)", str(job.source.device))
    weights = Table("weight", "role", "shape", "codec", "rank", title="Weights", title_justify="left")
    for spec in job.source.plan.weights:
        choice = job.allocation.choices[spec.module]
        shape = f"{spec.shape[0]} x {spec.shape[1]}"
        weights.add_row(spec.module, spec.role, shape, spelling(choice.codec), str(choice.rank))
    sizes = Table("part", "MB", title="Sizes", title_justify="left")
    for name, num_bytes in (
        ("weights to split, as they are", job.sizes.source),
        ("residual", job.sizes.residual),
        ("principal components", job.sizes.factors),
        ("copied as it is", job.sizes.copied),
        ("most on disk at any moment", job.sizes.disk),
    ):
        sizes.add_row(name, f"{num_bytes / 1e6:,.1f}")
    console.print(options, weights, sizes)
    console.print(f"Coverage: {job.header.reach}", soft_wrap=True, highlight=False)
    for left in job.header.coverage.left:
        console.print(f"Left: {left.pattern} ({left.size})", soft_wrap=True, highlight=False)
    shards = ", ".join(shard.file for shard in job.shards[:3]) + (" ..." if len(job.shards) > 3 else "")
    console.print(f"Files: {shards}", soft_wrap=True, highlight=False)
