"""The options of the ten commands: each one's flag, default, help text, range and group, written once.

qsvd/option_types.py says what the marks mean. The first line of a docstring is shown by `qsvd --help`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from qsvd.option_types import (
    ABOVE_ZERO,
    ADDED,
    APPEND,
    FROM_ZERO,
    POSITIONAL,
    PRINTS,
    SAME_RESULT,
    SECONDS,
    SEED,
    SHARE,
    TOP_P,
    Accumulate,
    AdapterDtype,
    Allocation,
    Allocator,
    Base,
    BatchSize,
    Checkpointing,
    ComputeDtype,
    Data,
    DataSplit,
    Device,
    DoubleQuant,
    Exclude,
    Group,
    Help,
    Include,
    Json,
    LayerMajor,
    LossOn,
    Map,
    MaxLength,
    Method,
    Model,
    Objective,
    Optimizer,
    Public,
    PushToHub,
    Resident,
    Seed,
    ShardSize,
    Statistics,
    Step,
    StoredDtype,
    at_least,
)


@dataclass(frozen=True)
class Allocate:
    """Choose bits and rank of each layer: the least error within a budget.

    The output is a text file for qsvd quantize --allocation; you can edit it. Measured errors are kept in
    FILE.costs.jsonl: a stopped run continues from there, and another budget or allocator takes seconds.
    """

    model: Annotated[Model, SAME_RESULT]
    budget: Annotated[str, SAME_RESULT, Help("Size of weights and components: 2.75bits per weight, or 20GB.", "SIZE")]
    out: Annotated[Path, SAME_RESULT, Help("Output file. An edited file is never overwritten.", "FILE")]

    allocator: Annotated[Allocator, SAME_RESULT, Group("method")] = "both"
    objective: Annotated[Objective, SAME_RESULT] = "relative"
    statistics: Annotated[Statistics, SAME_RESULT] = None
    rank: Annotated[int, SAME_RESULT, Help("Rank of every layer, for --allocator bits.")] = 64
    codecs: Annotated[
        tuple[str, ...], Help("Formats to try, e.g. nf3-64-8x256. Default: seven of them.", "NAME ...")
    ] = ()
    ranks: Annotated[tuple[int, ...], Help("Ranks to try, e.g. 0 16 64. Default: 0 and powers of two.", "N ...")] = ()
    count: Annotated[
        Literal["stored", "training"], SAME_RESULT, Help("What the budget limits: file size, or memory in training.")
    ] = "stored"
    gap: Annotated[float, SAME_RESULT, at_least(0), Help("Relative optimality gap at which the solver stops.")] = 1e-4
    time_limit: Annotated[float, SAME_RESULT, SECONDS, Help("Time limit of the solver in seconds.")] = 60.0

    include: Annotated[Include, SAME_RESULT, Group("layer")] = ()
    exclude: Annotated[Exclude, SAME_RESULT] = ()

    dtype: Annotated[StoredDtype, Group("run")] = "bfloat16"
    device: Device = "auto"
    seed: Seed = 0


@dataclass(frozen=True)
class Calibrate:
    """Estimate how sensitive the loss is to each weight.

    Measures Fisher information and, with --traces, Hessian traces. A language model takes texts, chats or completions,
    a classifier takes labelled texts. One block is in memory at a time.
    """

    model: Annotated[Model, SAME_RESULT]
    data: Annotated[Data, SAME_RESULT]
    out: Annotated[Path, SAME_RESULT, Help("Output file. The same command continues a stopped run.", "FILE")]

    examples: Annotated[int, Group("data"), at_least(1), Help("Number of examples, drawn by --seed.")] = 128
    max_length: MaxLength = None
    traces: Annotated[int, at_least(0), Help("Random probes per example for Hessian traces; 0: no traces.")] = 0
    loss_on: LossOn = "answers"
    map: Annotated[Map, SAME_RESULT] = ()
    split: Annotated[DataSplit, SAME_RESULT] = "train"

    include: Annotated[Include, Group("layer")] = ()
    exclude: Annotated[Exclude, Help("Layers to leave out.", "GLOB ...")] = ()

    dtype: Annotated[ComputeDtype, Group("run")] = "auto"
    chunk: Annotated[
        int | None,
        SAME_RESULT,
        at_least(1),
        Help("Examples processed together. Affects memory only. Default: what fits."),
    ] = None
    device: Device = "auto"
    seed: Annotated[Seed, Help("Random seed (choice of examples, probes).")] = 0


@dataclass(frozen=True)
class Quantize:
    """Quantize a 16-bit model and keep the largest singular components in 16 bits.

    Every layer gets 4 bits and --rank components; with --budget, each layer gets its own bits and rank.
    """

    model: Annotated[Model, SAME_RESULT]
    out: Annotated[Path, SAME_RESULT, Help("Output folder. The same command continues a stopped run.", "OUT")]

    rank: Annotated[int, Group("method"), at_least(0), Help("Components per layer; 0 is plain NF4 (QLoRA).")] = 64
    iterations: Annotated[int, at_least(1), Help("Maximum iterations; the best one is kept.")] = 5
    order: Annotated[Step, Help("First step: svd (QPiSSA, LQ-LoRA) or quantize (LoftQ).")] = "svd"
    end: Annotated[Step, Help("Last step of each iteration; quantize is QPiSSA as published.")] = "svd"
    stop: Annotated[Literal["rise", "never"], Help("rise: stop when the error rises; never: all iterations.")] = "rise"
    svd: Annotated[Literal["randomized", "exact"], Help("exact is slow above a few thousand rows.")] = "randomized"
    dtype: StoredDtype = "bfloat16"
    double_quant: DoubleQuant = True

    budget: Annotated[
        str | None,
        Group("mixed-precision"),
        Help("Size of weights and components: 2.75bits per weight, or 20GB.", "SIZE"),
    ] = None
    allocator: Allocator = "both"
    objective: Objective = "relative"
    statistics: Annotated[Statistics, SAME_RESULT] = None
    allocation: Annotated[Allocation, SAME_RESULT] = None

    include: Annotated[Include, Group("layer")] = ()
    exclude: Exclude = ()

    shard_size: Annotated[ShardSize, Group("run")] = "5GB"
    device: Device = "auto"
    seed: Annotated[Seed, Help("Random seed (SVD sketches).")] = 0
    push_to_hub: Annotated[PushToHub, SAME_RESULT] = None
    public: Annotated[Public, SAME_RESULT] = False
    dry_run: Annotated[bool, SAME_RESULT, PRINTS, Help("Print options, layers and sizes, and stop.")] = False


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """The options of a training run, with their defaults: `qsvd train` runs it, `qsvd plan` describes it."""

    method: Annotated[
        Method,
        Group("adapter"),
        Help("pissa: train the components; lora: new adapter; auto: pissa, or lora at rank 0."),
    ] = "auto"
    rank: Annotated[
        int | None, at_least(1), Help("LoRA rank. Default: 64 for lora; the stored rank for pissa and edora.")
    ] = None
    alpha: Annotated[
        float | None,
        ABOVE_ZERO,
        Help("Scale is alpha / rank. Default: rank / 4 for lora (2 with --rslora); the rank for edora."),
    ] = None
    rslora: Annotated[bool, ADDED, Help("lora: scale is alpha / sqrt(rank).")] = False
    dropout: Annotated[float, ADDED, SHARE, Help("lora: dropout on the input of the adapter.")] = 0.0
    target_modules: Annotated[
        tuple[str, ...],
        ADDED,
        Help("Layers to train: names (q_proj v_proj), globs on paths, or all-linear. Default: all.", "NAME ..."),
    ] = ()
    init_from: Annotated[
        Path | None, SAME_RESULT, Help("Start from the adapter of another run on the same quantized model.", "RUN")
    ] = None

    learning_rate: Annotated[
        float | None, Group("schedule"), ABOVE_ZERO, Help("Default: 2e-5 for pissa, 2e-4 for lora, 1e-3 for edora.")
    ] = None
    schedule: Annotated[Literal["cosine", "linear", "constant"], Help("Learning rate after the warm-up.")] = "cosine"
    warmup: Annotated[float, SHARE, Help("Warm-up ratio: fraction of steps.")] = 0.03
    epochs: Annotated[float, ABOVE_ZERO, Help("Passes over the data. More, with --resume, extend a run.")] = 1.0
    steps: Annotated[int | None, at_least(1), Help("Optimizer steps, instead of --epochs.")] = None
    batch_size: BatchSize = 4
    accumulate: Accumulate = 4

    task: Annotated[
        Literal["auto", "causal", "classification"],
        SAME_RESULT,
        Group("data"),
        Help("causal: learn texts; classification: learn the column label. auto: by the columns and the model."),
    ] = "auto"
    chat_template: Annotated[
        str | None,
        SAME_RESULT,
        Help(
            "alpaca, chatml, gemma, llama3, mistral, vicuna, zephyr or a .jinja file. Default: the tokenizer's.",
            "NAME|FILE",
        ),
    ] = None
    max_length: MaxLength = None
    packing: Annotated[bool, Help("Put several short sequences in one row; they do not attend to each other.")] = False
    loss_on: LossOn = "answers"
    map: Map = ()
    split: DataSplit = "train"
    valid: Annotated[
        str | None, SAME_RESULT, Help("Validation data. Default: the folder's, or --held-out.", "DATA")
    ] = None
    held_out: Annotated[
        float, SHARE, Help("Fraction of the examples for validation if there is no other; 8 to 256 of them.")
    ] = 0.02

    eval_every: Annotated[
        int | None, Group("evaluation"), SAME_RESULT, at_least(1), Help("Steps between measurements of held-out loss.")
    ] = None
    keep_best: Annotated[bool, ADDED, Help("Take the adapter with the lowest held-out loss, not the last one.")] = False
    early_stopping: Annotated[
        int | None, ADDED, at_least(1), Help("Stop after so many measurements without a lower held-out loss.")
    ] = None

    optimizer: Annotated[
        Optimizer, Group("optimizer"), Help("Optimizer. auto: paged_adamw_8bit on a GPU, adamw on a CPU.")
    ] = "auto"
    weight_decay: Annotated[float, FROM_ZERO, Help("Weight decay of AdamW.")] = 0.0
    max_grad_norm: Annotated[float, FROM_ZERO, Help("Gradient clipping: maximum norm; 0: no clipping.")] = 1.0

    gradient_checkpointing: Annotated[Checkpointing, Group("memory")] = True
    activation_offload: Annotated[
        Literal["auto", "yes", "no"], SAME_RESULT, Help("Keep activation checkpoints in CPU memory. auto: if it helps.")
    ] = "auto"
    resident: Annotated[Resident, SAME_RESULT] = "auto"
    layer_major: LayerMajor = False
    gpu: Annotated[str | None, SAME_RESULT, Help("Maximum GPU memory, 24GB. Default: what is free.", "SIZE")] = None
    host: Annotated[str | None, SAME_RESULT, Help("Maximum CPU memory, 64GB. Default: what is free.", "SIZE")] = None
    dtype: ComputeDtype = "auto"
    adapter_dtype: AdapterDtype = "auto"

    device: Annotated[Device, Group("run")] = "auto"
    seed: Annotated[Seed, SEED, Help("Random seed (data order, LoRA init, new classification head).")] = 0


@dataclass(frozen=True)
class Train(TrainingOptions):
    """Train an adapter or the components of a quantized model; the residual stays frozen."""

    base: Annotated[Path, SAME_RESULT, Group(""), POSITIONAL, Help("Folder of a quantized model.", "OUT")]
    data: Annotated[Data, SAME_RESULT]
    out: Annotated[Path, SAME_RESULT, Help("Folder for checkpoints, adapter and summary.", "RUN")]

    save_every: Annotated[int, SAME_RESULT, Group("output"), at_least(1), Help("Steps between checkpoints.")] = 100
    keep: Annotated[int, SAME_RESULT, at_least(1), Help("Number of checkpoints to keep.")] = 2
    resume: Annotated[bool, SAME_RESULT, Help("Continue from the last complete checkpoint in RUN.")] = False
    report_to: Annotated[tuple[str, ...], SAME_RESULT, Help("tensorboard, wandb, trackio.", "TRACKER ...")] = ()
    push_to_hub: Annotated[PushToHub, SAME_RESULT] = None
    public: Annotated[Public, SAME_RESULT] = False

    preview: Annotated[
        bool, SAME_RESULT, PRINTS, Group("run"), Help("Print the first example with its trained tokens.")
    ] = False
    dry_run: Annotated[bool, SAME_RESULT, PRINTS, Help("Check everything, print what would be done, and stop.")] = False
    any_start: Annotated[bool, SAME_RESULT, Help("Do not stop if the first loss is unusually high.")] = False


@dataclass(frozen=True, kw_only=True)
class Plan(TrainingOptions):
    """Estimate GPU, CPU and disk memory from config.json (no download of weights).

    With DATA it describes the run of qsvd train with the same options, as its --dry-run does: OUT, DATA and all options
    of training mean the same in both. The exit code is 3 if something does not fit.
    """

    model: Annotated[
        Model, Group(""), Help("A 16-bit model, a quantized model, a config.json, or a Hub id.", "MODEL")
    ] = field(kw_only=False)
    data: Annotated[
        str | None, POSITIONAL, Help("Training data, as qsvd train takes: its steps and longest sequence.", "DATA")
    ] = field(default=None, kw_only=False)
    estimate: Annotated[
        Literal["auto", "all", "quantize", "train", "serve"],
        Help("What to estimate. auto: train, if there is DATA, else all.", aliases=("--for",)),
    ] = "auto"

    method: Annotated[Method, Group("adapter"), Help("As in qsvd train; lora on a 16-bit MODEL is QLoRA.")] = (
        TrainingOptions.method
    )
    rank: Annotated[int | None, at_least(0), Help("Components per layer. Default: as stored, or 64.")] = (
        TrainingOptions.rank
    )
    batch_size: Annotated[BatchSize, Help("Sequences per forward pass.", aliases=("--batch",))] = (
        TrainingOptions.batch_size
    )
    max_length: Annotated[
        MaxLength, Help("Maximum sequence length. Default: context, at most 1024.", aliases=("--tokens",))
    ] = TrainingOptions.max_length
    gpu: Annotated[str | None, Help("GPU memory, e.g. 24GB. Default: what is free on this machine.", "SIZE")] = (
        TrainingOptions.gpu
    )
    host: Annotated[str | None, Help("CPU memory, e.g. 64GB. Default: what is free, given a GPU.", "SIZE")] = (
        TrainingOptions.host
    )

    tflops: Annotated[
        float | None,
        Group("machine"),
        ABOVE_ZERO,
        Help("Speed, 16-bit TFLOP/s. Default: measured on a GPU of this machine, else assumed."),
    ] = None
    link: Annotated[float | None, ABOVE_ZERO, Help("CPU to GPU speed, GB/s. Default: measured here, else 25.")] = None
    disk: Annotated[float | None, ABOVE_ZERO, Help("Read speed of the disk, GB/s. Default: 3.")] = None

    double_quant: Annotated[DoubleQuant, Group("model")] = True
    budget: Annotated[str | None, Help("Total size, e.g. 2.75bits or 20GB. Default: 4-bit NF4.", "SIZE")] = None
    allocation: Allocation = None

    explore: Annotated[bool, Group("output"), Help("Print what fits: rank by sequence length by GPU memory.")] = False
    json: Json = False


@dataclass(frozen=True)
class Eval:
    """Measure perplexity, accuracy or exact match of several models on one data set."""

    models: Annotated[
        tuple[str, ...], POSITIONAL, Help("16-bit models, quantized models, runs, or Hub ids.", "MODEL ...")
    ]
    data: Annotated[str, Help("A text, or examples in any form that qsvd train takes.", "DATA")]
    task: Annotated[
        Literal["auto", "perplexity", "accuracy", "exact-match"],
        Help("What to measure. auto: accuracy for labels, exact-match for answers with ####, else perplexity."),
    ] = "auto"
    reference: Annotated[str | None, Help("16-bit model, for KL divergence and top-token agreement.", "MODEL")] = None

    window: Annotated[int | None, Group("text"), at_least(2), Help("Default: the context length, at most 2048.")] = None
    stride: Annotated[int | None, at_least(1), Help("Tokens between windows. Default: half a window.")] = None
    max_new_tokens: Annotated[int | None, at_least(1), Help("Maximum answer length. Default: 512, if it fits.")] = None

    limit: Annotated[int | None, Group("data"), at_least(1), Help("Use only the first examples. Default: all.")] = None
    map: Map = ()
    split: DataSplit = "train"

    base: Annotated[Base, Group("run")] = None
    batch_size: BatchSize = 8
    dtype: ComputeDtype = "auto"
    resident: Resident = "auto"
    device: Device = "auto"
    json: Json = False


@dataclass(frozen=True)
class Generate:
    """Generate text with a 16-bit model, a quantized model or a run.

    A prompt is a user's message where the tokenizer has a chat template, else the start of a text that the model
    continues. Without --prompt and --chat it is read from stdin. Answers go to stdout, everything else to stderr.
    """

    model: Annotated[str, POSITIONAL, Help("A 16-bit model, a quantized model, a run, or a Hub id.", "MODEL")]
    prompt: Annotated[tuple[str, ...], APPEND, Help("May be given several times. Default: stdin.", "TEXT")] = ()
    chat: Annotated[bool, Help("Read one message a line and keep the history; an empty line or /exit ends.")] = False
    system: Annotated[str | None, Help("System prompt, for a model with a chat template.", "TEXT")] = None
    raw: Annotated[bool, Help("Give the prompt to the model as it is, without the chat template.")] = False

    temperature: Annotated[
        float | None, Group("sampling"), FROM_ZERO, Help("0: greedy. Default: generation_config.json, else greedy.")
    ] = None
    top_p: Annotated[float | None, TOP_P, Help("Nucleus sampling. Default: generation_config.json, else 1.")] = None
    max_new_tokens: Annotated[
        int | None, at_least(1), Help("Maximum answer length. Default: generation_config.json, else 512, if it fits.")
    ] = None
    seed: Annotated[Seed, SEED, Help("Random seed (sampling).")] = 0

    base: Annotated[Base, Group("run")] = None
    dtype: ComputeDtype = "auto"
    resident: Resident = "auto"
    device: Device = "auto"


@dataclass(frozen=True)
class Export:
    """Write a run or a quantized model in a form that other tools load."""

    run: Annotated[Path, POSITIONAL, Help("A run, one of its checkpoints, or a quantized model.", "RUN")]
    out: Annotated[Path, Help("Output folder. The same command continues a stopped export.", "DIR")]
    to: Annotated[
        Literal["peft", "lora", "merged"],
        Help("peft: adapter for the residual; lora: adapter for the original 16-bit model; merged: 16-bit weights."),
    ]
    base: Base = None
    original: Annotated[
        str | None, Help("For lora: the 16-bit model. Default: where it was when it was quantized.", "MODEL")
    ] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Help("Dtype of the output. auto: float32 for adapters, the dtype of the 16-bit model for merged weights."),
    ] = "auto"
    shard_size: ShardSize = "5GB"
    check: Annotated[bool, Help("Load the output and compare its logits, if there is enough memory.")] = True
    push_to_hub: PushToHub = None
    public: Public = False


@dataclass(frozen=True)
class Report:
    """Show the quantization error of a quantized model: by layer type, the worst layers, in total."""

    folder: Annotated[Path, POSITIONAL, Help("Folder of a quantized model.", "OUT")]
    json: Json = False
    worst: Annotated[int, at_least(0), Help("Number of worst layers to list.")] = 10


@dataclass(frozen=True)
class Demo:
    """Quantize a small built-in model at several ranks, compare perplexity, and fine-tune it by three methods."""

    out: Annotated[Path, Help("Output folder.", "DIR")] = Path("build/demo")
    ranks: Annotated[tuple[int, ...], Help("Ranks to try.", "N ...")] = (0, 16, 32, 64)
    tokens: Annotated[int, Help("Tokens of the held-out text.")] = 20_000
    epochs: Annotated[float, ABOVE_ZERO, Help("Passes over the fine-tuning text.")] = 2.0
