"""Flags of what makes a split base, and of the table of what it cost."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Quantize:
    """Split a 16-bit checkpoint into a residual of few bits and principal components, with a report of the error.

    4 bits and --rank for every weight, or bits and ranks where they count within one --budget.

    Flags may stand in a YAML file, `--config FILE.yaml`; those on the command line win.
    """

    model: Annotated[Positional[str], arg(metavar="MODEL", help="Folder of a 16-bit checkpoint, or a hub id.")]
    out: Annotated[Path, arg(metavar="DIR", help="Result; a killed run with the same options goes on there.")]
    rank: Annotated[int, arg(help="Principal components kept in high precision; 0 is plain NF4 (QLoRA).")] = 64
    iterations: Annotated[int, arg(help="Most passes of the loop; the best is kept.")] = 5
    order: Annotated[
        Literal["svd", "quantize"], arg(help="What comes first: svd is QPiSSA and LQ-LoRA, quantize is LoftQ.")
    ] = "svd"
    end: Annotated[
        Literal["svd", "quantize"],
        arg(help="What a pass ends with: svd fits the factors once more; quantize is QPiSSA as published."),
    ] = "svd"
    stop: Annotated[Literal["rise", "never"], arg(help="End the loop when the error rises, or never.")] = "rise"
    svd: Annotated[Literal["randomized", "exact"], arg(help="exact is slow above a side of some thousand.")] = (
        "randomized"
    )
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], arg(help="Of the stored components.")] = "bfloat16"
    double_quant: Annotated[bool, arg(help="Scales in 8 bits: 4.13 bits a weight in all instead of 4.5.")] = True
    budget: Annotated[
        str | None,
        arg(
            metavar="SIZE",
            help="2.75bits for each number that is split, or 20GB for all: tensors, components included.",
        ),
    ] = None
    allocator: Annotated[
        Literal["both", "bits", "uniform", "sara", "prilora"],
        arg(help="What a budget decides, as in qsvd allocate: both: bits and ranks; bits: at --rank (LQ-LoRA)."),
    ] = "both"
    objective: Annotated[
        Literal["relative", "frobenius", "fisher", "hessian"],
        arg(help="What a budget minimises: errors over the norm of each weight, plain ones, or by statistics."),
    ] = "relative"
    statistics: Annotated[
        Path | None, arg(metavar="FILE", help="Of qsvd calibrate; for the objectives fisher and hessian.")
    ] = None
    allocation: Annotated[
        Path | None, arg(metavar="FILE", help="Codec and rank of every weight, as qsvd allocate writes them.")
    ] = None
    include: Annotated[
        tuple[str, ...], arg(metavar="GLOB ...", help="Split only modules that match: '*.self_attn.*'.")
    ] = ()
    exclude: Annotated[tuple[str, ...], arg(metavar="GLOB ...", help="Leave modules that match in 16 bits.")] = ()
    shard_size: Annotated[str, arg(metavar="SIZE", help="Most bytes of one output file: 500MB, 5GB.")] = "5GB"
    device: Annotated[str, arg(help="auto (a GPU if there is one), cpu, cuda, cuda:1.")] = "auto"
    seed: Annotated[int, arg(help="Of the random sketches.")] = 0
    dry_run: Annotated[bool, arg(help="Print options, weights and sizes, and stop.")] = False


@dataclass(frozen=True)
class Report:
    """Show what quantization cost: a table by role, the worst weights, the totals."""

    folder: Annotated[Positional[Path], arg(metavar="DIR", help="A result of qsvd quantize.")]
    json: Annotated[bool, arg(help="Print everything as JSON.")] = False
    worst: Annotated[int, arg(help="How many of the worst weights to list.")] = 10


# Flags of qsvd allocate.


@dataclass(frozen=True)
class Allocate:
    """Decide how many bits and components every weight gets, so that all fit one budget with the least error.

    Writes a table for qsvd quantize --allocation, which may be edited. Measurements stay beside it, in
    FILE.costs.jsonl: a killed run goes on there, and another budget or allocator takes seconds.
    """

    model: Annotated[Positional[str], arg(metavar="MODEL", help="Folder of a 16-bit checkpoint, or a hub id.")]
    budget: Annotated[
        str, arg(metavar="SIZE", help="2.75bits for each number that is split, or 20GB for all; factors included.")
    ]
    out: Annotated[
        Path, arg(metavar="FILE", help="The table; replaces one that it wrote for this model and nobody edited.")
    ]
    allocator: Annotated[
        Literal["both", "bits", "uniform", "sara", "prilora"],
        arg(help="both: bits and ranks; bits: at --rank (LQ-LoRA); uniform: one pair; sara, prilora: ranks by rule."),
    ] = "both"
    objective: Annotated[
        Literal["relative", "frobenius", "fisher", "hessian"],
        arg(
            help="Errors over the norm of their weight, plain ones, by Fisher information, or by traces of the Hessian."
        ),
    ] = "relative"
    statistics: Annotated[
        Path | None, arg(metavar="FILE", help="Of qsvd calibrate; for the objectives fisher and hessian.")
    ] = None
    rank: Annotated[int, arg(help="Of every weight with allocator bits.")] = 64
    codecs: Annotated[
        tuple[str, ...], arg(metavar="NAME ...", help="To try, nf3-64-8x256; none: seven of 2, 3, 4 and 8 bits.")
    ] = ()
    ranks: Annotated[
        tuple[int, ...], arg(metavar="N ...", help="To try, 0 16 64; none: 0 and powers of two up to 4 bits a number.")
    ] = ()
    count: Annotated[
        Literal["stored", "training"],
        arg(help="What the budget is for: the files, or memory while the factors train, with gradient and state."),
    ] = "stored"
    gap: Annotated[float, arg(help="From the optimum, relative, at which the solver may stop.")] = 1e-4
    time_limit: Annotated[float, arg(help="Seconds for the solver.")] = 60.0
    include: Annotated[
        tuple[str, ...], arg(metavar="GLOB ...", help="Split only modules that match: '*.self_attn.*'.")
    ] = ()
    exclude: Annotated[tuple[str, ...], arg(metavar="GLOB ...", help="Leave modules that match in 16 bits.")] = ()
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], arg(help="Of the stored components.")] = "bfloat16"
    device: Annotated[str, arg(help="auto (a GPU if there is one), cpu, cuda, cuda:1.")] = "auto"
    seed: Annotated[int, arg(help="Of the random sketches.")] = 0


# Flags of qsvd calibrate.


@dataclass(frozen=True)
class Calibrate:
    """Measure on examples which numbers of the weights matter: second moments of gradients, and traces of the Hessian.

    A language model takes texts, chats or completions, a classifier labelled texts. One block is in memory at a time.
    """

    model: Annotated[Positional[str], arg(metavar="MODEL", help="Folder of a 16-bit checkpoint, or a hub id.")]
    data: Annotated[Positional[str], arg(metavar="DATA", help="Examples, as qsvd train takes them.")]
    out: Annotated[Path, arg(metavar="FILE", help="Result; a killed run with the same options goes on there.")]
    examples: Annotated[int, arg(help="How many to use, drawn by --seed where there are more.")] = 128
    max_length: Annotated[
        int | None,
        arg(help="Tokens of an example; longer ones are cut, longer texts divided. None: the context, 1024 at most."),
    ] = None
    traces: Annotated[int, arg(help="Random probes of the Hessian for each example; 0 leaves traces out.")] = 0
    loss_on: Annotated[Literal["answers", "all"], arg(help="Tokens that count, where there are answers.")] = "answers"
    map: Annotated[
        tuple[str, ...], arg(metavar="COLUMN=NAME ...", help="Columns of the file under the names qsvd knows.")
    ] = ()
    split: Annotated[str, arg(help="Of a hub data set or a folder.")] = "train"
    include: Annotated[
        tuple[str, ...], arg(metavar="GLOB ...", help="Only modules that match, as in qsvd quantize.")
    ] = ()
    exclude: Annotated[tuple[str, ...], arg(metavar="GLOB ...", help="Leave modules that match out.")] = ()
    chunk: Annotated[
        int | None,
        arg(help="Examples for which the weights are read twice; the result is the same. None: what memory allows."),
    ] = None
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"], arg(help="To compute in; auto is bfloat16 on a GPU, float32 on a CPU.")
    ] = "auto"
    device: Annotated[str, arg(help="auto (a GPU if there is one), cpu, cuda, cuda:1.")] = "auto"
    seed: Annotated[int, arg(help="Of the examples that are drawn, and of the probes.")] = 0


# Flags of qsvd plan.


@dataclass(frozen=True)
class Plan:
    """Say before any work what fits: bytes on GPU, host and disk, by item, from config.json alone.

    The exit code is 3 where something does not fit.
    """

    model: Annotated[
        Positional[str],
        arg(metavar="MODEL", help="A 16-bit checkpoint, a result of qsvd quantize, a config.json, or a hub id."),
    ]
    task: Annotated[
        Literal["all", "quantize", "train", "serve"], arg(aliases=["--for"], help="What shall be done with it.")
    ] = "all"
    gpu: Annotated[
        str | None, arg(metavar="SIZE", help="Memory of the card, 24GB; None: of the one here, or no limit.")
    ] = None
    host: Annotated[
        str | None, arg(metavar="SIZE", help="Memory of the host, 64GB; None: what is free where a card is here.")
    ] = None
    rank: Annotated[int | None, arg(help="Of the components; None: the stored one, or 64.")] = None
    method: Annotated[
        Literal["auto", "pissa", "lora", "edora"], arg(help="As in qsvd train; lora on a 16-bit MODEL is QLoRA.")
    ] = "auto"
    tokens: Annotated[int | None, arg(help="Of a sequence; None: the context, 2048 at most.")] = None
    batch: Annotated[int, arg(help="Sequences that go through the model together.")] = 1
    accumulate: Annotated[int, arg(help="Batches in one step.")] = 4
    optimizer: Annotated[
        Literal["auto", "adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"],
        arg(help="auto is paged_adamw_8bit."),
    ] = "auto"
    adapter_dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], arg(help="Of what is trained; auto is float32 up to 268 M parameters.")
    ] = "auto"
    gradient_checkpointing: Annotated[bool, arg(help="Compute activations twice instead of keeping them.")] = True
    resident: Annotated[
        Literal["auto"] | float, arg(help="Share of blocks that stay on the card, 0 to 1; auto: as many as fit.")
    ] = "auto"
    layer_major: Annotated[
        bool, arg(help="All batches of a step go through a block before the next block: weights move once for all.")
    ] = False
    double_quant: Annotated[bool, arg(help="Scales in 8 bits: 4.13 bits a weight in all instead of 4.5.")] = True
    budget: Annotated[
        str | None, arg(metavar="SIZE", help="For residuals and components of rank --rank: 2.75bits, 20GB. None: NF4.")
    ] = None
    allocation: Annotated[
        Path | None, arg(metavar="FILE", help="Codec and rank of every weight, as qsvd allocate writes them.")
    ] = None
    explore: Annotated[bool, arg(help="A table of what fits: rank by sequence by card.")] = False
    tflops: Annotated[
        float | None,
        arg(help="Of the card in 16 bits, as it really does them, 10^12 a second; None: measured here, or 100."),
    ] = None
    link: Annotated[float | None, arg(help="Host to card, GB a second; None: measured here, or 25.")] = None
    disk: Annotated[float | None, arg(help="Disk, GB a second; None: 3.")] = None
    json: Annotated[bool, arg(help="Print everything as JSON.")] = False


# Flags of qsvd train.


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


# Flags of qsvd eval.


@dataclass(frozen=True)
class Eval:
    """Measure models on one data set: 16-bit checkpoints, results of qsvd quantize, runs of qsvd train."""

    models: Annotated[
        Positional[tuple[str, ...]], arg(metavar="MODEL ...", help="Folders of any of the three, or a hub id (16-bit).")
    ]
    data: Annotated[str, arg(metavar="DATA", help="A text, or examples as qsvd train takes them.")]
    task: Annotated[
        Literal["auto", "perplexity", "accuracy", "exact-match"],
        arg(help="auto: accuracy for labels, exact-match for answers with ####, else perplexity."),
    ] = "auto"
    reference: Annotated[
        str | None, arg(metavar="MODEL", help="The 16-bit model, for KL divergence and top-token agreement.")
    ] = None
    window: Annotated[int | None, arg(help="Tokens the model sees at once; None: its context, 2048 at most.")] = None
    stride: Annotated[int | None, arg(help="Tokens from window to window of one text; None: half a window.")] = None
    limit: Annotated[int | None, arg(help="Examples to use, from the first; None: all.")] = None
    batch_size: Annotated[int, arg(help="Sequences that go through a model together.")] = 8
    max_new_tokens: Annotated[
        int | None, arg(help="Tokens after which an answer is cut; None: 512, or what the context leaves.")
    ] = None
    map: Annotated[
        tuple[str, ...], arg(metavar="COLUMN=NAME ...", help="Columns of the file under the names qsvd knows.")
    ] = ()
    split: Annotated[str, arg(help="Of a hub data set or a folder.")] = "train"
    base: Annotated[Path | None, arg(metavar="DIR", help="Base of the runs, if it has moved.")] = None
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"], arg(help="To compute in; auto is bfloat16 on a GPU, float32 on a CPU.")
    ] = "auto"
    resident: Annotated[
        Literal["auto"] | float,
        arg(help="Share of blocks whose 4-bit weights stay on the device, 0 to 1; others visit it. auto: what fits."),
    ] = "auto"
    device: Annotated[str, arg(help="auto (a GPU if there is one), cpu, cuda, cuda:1.")] = "auto"
    json: Annotated[bool, arg(help="Print everything as JSON.")] = False


# Flags of qsvd export.


@dataclass(frozen=True)
class Export:
    """Write a run of qsvd train, or a result of qsvd quantize, in the form that other tools load."""

    run: Annotated[
        Positional[Path], arg(metavar="RUN", help="A run, a checkpoint of it, or a result of qsvd quantize.")
    ]
    out: Annotated[Path, arg(metavar="DIR", help="Result; a killed export with the same options goes on there.")]
    to: Annotated[
        Literal["peft", "lora", "merged"],
        arg(help="peft: LoRA or DoRA on the residual; lora: on the original 16-bit model; merged: 16-bit weights."),
    ]
    base: Annotated[Path | None, arg(metavar="DIR", help="Base of the run, if it has moved.")] = None
    original: Annotated[
        str | None, arg(metavar="MODEL", help="For lora: the 16-bit model; None: where it was when it was split.")
    ] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        arg(help="Of what is written; auto is float32 for factors, the source's own for merged weights."),
    ] = "auto"
    shard_size: Annotated[str, arg(metavar="SIZE", help="Most bytes of one merged file: 500MB, 5GB.")] = "5GB"
    check: Annotated[bool, arg(help="Load the result and compare its logits, if memory allows.")] = True


# Flags of qsvd demo.


@dataclass(frozen=True)
class Demo:
    """Quantize the embedded model at several ranks, compare held-out perplexity, and fine-tune it in three ways."""

    out: Annotated[Path, arg(metavar="DIR", help="Where the results go.")] = Path("build/demo")
    ranks: Annotated[tuple[int, ...], arg(help="Ranks to try.")] = (0, 16, 32, 64)
    tokens: Annotated[int, arg(help="Tokens of the held-out text to measure on.")] = 20_000
    epochs: Annotated[float, arg(help="Passes over the fine-tuning text.")] = 2.0
