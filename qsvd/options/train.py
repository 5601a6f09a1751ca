"""Flags of qsvd train."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Train:
    """Train adapters beside the frozen residual of a result of qsvd quantize."""

    base: Annotated[Positional[Path], arg(metavar="DIR", help="A result of qsvd quantize.")]
    data: Annotated[
        Positional[str],
        arg(
            metavar="DATA",
            help="JSON, JSONL, CSV, Parquet or text file, a folder with train and valid files, a hub id.",
        ),
    ]
    out: Annotated[Path, arg(metavar="RUN", help="Where checkpoints, the adapter and the summary go.")]
    method: Annotated[
        Literal["auto", "pissa", "lora", "edora"],
        arg(help="pissa trains the stored components, lora beside them; auto is pissa, or lora at rank 0 (QLoRA)."),
    ] = "auto"
    rank: Annotated[int | None, arg(help="Of what is trained; None: pissa, edora the stored rank, lora 64.")] = None
    alpha: Annotated[float | None, arg(help="Scale is alpha / rank; None: lora 16, edora the rank.")] = None
    learning_rate: Annotated[float | None, arg(help="None: pissa 2e-5, lora 2e-4, edora 1e-3; the guide says why.")] = (
        None
    )
    schedule: Annotated[Literal["cosine", "linear", "constant"], arg(help="After the warm-up.")] = "cosine"
    warmup: Annotated[float, arg(help="Share of the steps that the rate takes to rise.")] = 0.03
    epochs: Annotated[float, arg(help="Passes over the data.")] = 1.0
    steps: Annotated[int | None, arg(help="Optimizer steps, instead of --epochs.")] = None
    batch_size: Annotated[int, arg(help="Sequences that go through the model together.")] = 4
    accumulate: Annotated[int, arg(help="Batches in one step.")] = 4
    max_length: Annotated[
        int | None,
        arg(
            help="Tokens of a sequence; longer examples are cut, longer texts divided. None: the context, 1024 at most."
        ),
    ] = None
    packing: Annotated[bool, arg(help="Several short sequences in one row; they do not see each other.")] = False
    loss_on: Annotated[Literal["answers", "all"], arg(help="Tokens that are trained, where there are answers.")] = (
        "answers"
    )
    map: Annotated[
        tuple[str, ...], arg(metavar="COLUMN=NAME ...", help="Columns of the file under the names qsvd knows.")
    ] = ()
    split: Annotated[str, arg(help="Of a hub data set or a folder.")] = "train"
    valid: Annotated[str | None, arg(metavar="DATA", help="Held-out examples; None: the folder's, or --held-out.")] = (
        None
    )
    held_out: Annotated[float, arg(help="Share of the examples to hold out where none are given; 256 at most.")] = 0.02
    optimizer: Annotated[
        Literal["auto", "adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"],
        arg(help="auto is paged_adamw_8bit on a GPU, adamw on a CPU."),
    ] = "auto"
    weight_decay: Annotated[float, arg(help="Of AdamW.")] = 0.0
    max_grad_norm: Annotated[float, arg(help="Larger gradients are scaled down to it; 0 leaves them.")] = 1.0
    gradient_checkpointing: Annotated[bool, arg(help="Compute activations twice instead of keeping them.")] = True
    activation_offload: Annotated[
        Literal["auto", "yes", "no"], arg(help="Keep checkpoints of activations in host memory; auto: where it helps.")
    ] = "auto"
    resident: Annotated[
        Literal["auto"] | float,
        arg(help="Share of blocks whose 4-bit weights stay on the device, 0 to 1; others visit it. auto: what fits."),
    ] = "auto"
    layer_major: Annotated[
        bool, arg(help="All batches of a step go through a block before the next block: weights move once for all.")
    ] = False
    gpu: Annotated[str | None, arg(metavar="SIZE", help="Most GPU memory to use, 24GB; None: what is free.")] = None
    host: Annotated[str | None, arg(metavar="SIZE", help="Most host memory to use, 64GB; None: what is free.")] = None
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"], arg(help="To compute in; auto is bfloat16 on a GPU, float32 on a CPU.")
    ] = "auto"
    adapter_dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], arg(help="Of what is trained; auto is float32 up to 268 M parameters.")
    ] = "auto"
    save_every: Annotated[int, arg(help="Steps from checkpoint to checkpoint.")] = 100
    keep: Annotated[int, arg(help="Checkpoints that stay.")] = 2
    resume: Annotated[bool, arg(help="Go on from the newest whole checkpoint in RUN.")] = False
    report_to: Annotated[tuple[str, ...], arg(metavar="TRACKER ...", help="tensorboard, wandb, trackio.")] = ()
    any_start: Annotated[bool, arg(help="Train even if the first loss is absurd.")] = False
    preview: Annotated[bool, arg(help="Print the first example with its trained tokens marked, and stop.")] = False
    dry_run: Annotated[bool, arg(help="Check everything, print what would be done, and stop.")] = False
    device: Annotated[str, arg(help="auto (a GPU if there is one), cpu, cuda, cuda:1.")] = "auto"
    seed: Annotated[int, arg(help="Of the order of the data, of LoRA's start and of a new head.")] = 0
