"""What `qsvd quantize --dry-run` prints: the resolved options, the weights and the expected sizes."""

from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from qsvd.commands.job import Job
from qsvd.numerics.codecs import spelling
from qsvd.report.header import left_line


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
        console.print(f"Left: {left.pattern} ({left_line(left)})", soft_wrap=True, highlight=False)
    shards = ", ".join(shard.file for shard in job.shards[:3]) + (" ..." if len(job.shards) > 3 else "")
    console.print(f"Files: {shards}", soft_wrap=True, highlight=False)
