"""The files around the shards: adapter, configs, tokenizer, error records, report, README and, last, the manifest."""

import json
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from qsvd.checkpoint.layout import adapter_config, fingerprint, quantization_config
from qsvd.checkpoint.tensor_file import read_header
from qsvd.checkpoint.whole_file import whole_file, write_text
from qsvd.checkpoint.write import MANIFEST, OutputFolder, to_json
from qsvd.commands.prepare import Job
from qsvd.report.markdown import to_markdown
from qsvd.report.readme import readme
from qsvd.report.record import from_record, to_record

FORMAT = 1
LIBRARIES = ("qsvd", "torch", "bitsandbytes", "transformers", "peft", "safetensors")
TASKS = {  # PEFT's task_type; for classifiers none, since PEFT would look for a head among the factors
    "ForCausalLM": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


def finish(job: Job, folder: OutputFolder) -> None:
    """Write what belongs to a complete result, then drop the folder of unfinished work. May be run again.

    A weight whose record is null was drawn, not split: it has no error, and the report says so.
    """
    digests = {spec.name: folder.residual_sha256(number) for number, spec in enumerate(job.plan.weights)}
    base = fingerprint(digests)
    records = [folder.record(number) for number in range(len(job.plan.weights))]
    errors = [from_record(record) for record in records if record is not None]
    if job.options.rank > 0:
        _write_adapter(job, folder, base)
    _write_config(job)
    _write_index(job)
    for source in job.checkpoint.other_files:
        with whole_file(job.out / source.name) as file:
            file.write(source.read_bytes())
    write_text(job.out / "errors.jsonl", "".join(f"{json.dumps(to_record(error))}\n" for error in errors))
    write_text(job.out / "report.md", to_markdown(job.header, errors) if errors else _unmeasured(job))
    write_text(job.out / "README.md", readme(job.header, str(job.out), job.plan.architecture))
    write_text(job.out / MANIFEST, to_json(_manifest(job, digests, base)))
    folder.close()


def _write_adapter(job: Job, folder: OutputFolder, base: str) -> None:
    metadata = {"qsvd_base_fingerprint": base}
    folder.write_adapter("adapter/adapter_model.safetensors", range(len(job.plan.weights)), metadata)
    task = next((task for ending, task in TASKS.items() if job.plan.architecture.endswith(ending)), None)
    modules = [spec.module for spec in job.plan.weights]
    config = adapter_config(modules, job.options.rank, task, str(job.out))
    write_text(job.out / "adapter" / "adapter_config.json", to_json(config))


def _write_config(job: Job) -> None:
    """The source's config.json as it is, with the quantization added."""
    quantization = quantization_config(list(job.skipped), double_quant=job.codec.double_quant, dtype=job.compute_dtype)
    config = job.checkpoint.config_json | {"quantization_config": quantization}
    write_text(job.out / "config.json", to_json(config))


def _write_index(job: Job) -> None:
    if len(job.shards) == 1:
        return
    headers = {shard.file: read_header(job.out / shard.file) for shard in job.shards}
    weight_map = {name: file for file, header in headers.items() for name in header.tensors}
    total = sum(entry.num_bytes for header in headers.values() for entry in header.tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(job.out / "model.safetensors.index.json", to_json(index))


def _unmeasured(job: Job) -> str:
    return f"# {job.header.model}\n\n{job.header.method}.\n\nNo weight was split, so no error was measured.\n"


def _manifest(job: Job, digests: dict[str, str], base: str) -> dict[str, Any]:
    file_of = {number: shard.file for shard in job.shards for number in shard.weights}
    weights = {
        spec.name: {
            "module": spec.module,
            "shape": list(spec.shape),
            "role": spec.role,
            "rank": job.options.rank,
            "file": file_of[number],
            "residual_sha256": digests[spec.name],
        }
        for number, spec in enumerate(job.plan.weights)
    }
    checkpoint = job.checkpoint
    return {
        "format": FORMAT,
        "fingerprint": base,
        "source": {
            "model": checkpoint.name,
            "revision": checkpoint.revision,
            "fingerprint": checkpoint.fingerprint,
            "architecture": job.plan.architecture,
        },
        "run": job.identity,
        "versions": {name: version(name) for name in LIBRARIES},
        "header": asdict(job.header),
        "weights": weights,
    }
