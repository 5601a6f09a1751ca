"""The options of `qsvd train`, and of `qsvd plan`, which plans such a run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from qsvd.option_types import (
    ABOVE_ZERO,
    ADDED,
    FROM_ZERO,
    INTERCONNECT,
    POSITIONAL,
    PRINTS,
    SAME_RESULT,
    SEED,
    SHARE,
    Accumulate,
    AdapterDtype,
    Allocation,
    Checkpointing,
    ComputeDtype,
    Data,
    DataSplit,
    Device,
    DoubleQuant,
    EmbeddingBits,
    ExpertRank,
    Format,
    Group,
    HeadBits,
    Help,
    IncludeTowers,
    Json,
    LayerMajor,
    LossOn,
    Map,
    MaxLength,
    Method,
    MicroBatch,
    Model,
    Optimizer,
    Public,
    PushToHub,
    Resident,
    Seed,
    StepTokens,
    at_least,
)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """The options of a training run, with their defaults: `qsvd train` runs it, `qsvd plan` describes it."""

    method: Annotated[
        Method,
        Group("adapter"),
        Help("pissa: train the components; lora: new adapter; auto: pissa, or lora at rank 0."),
    ] = "auto"
    rank: Annotated[
        int | None,
        at_least(1),
        Help("LoRA rank, or components per layer. Default: 64 for lora or a 16-bit model, else as stored."),
    ] = None
    alpha: Annotated[
        float | None,
        ABOVE_ZERO,
        Help("Scale is alpha / rank. Default: by the method, rank / 4 for lora (2 with --rslora)."),
    ] = None
    rslora: Annotated[
        bool, ADDED, Help("lora, dora, lora-fa, lora-ga, melora, cora, delta-lora: scale is alpha / sqrt(rank).")
    ] = False
    dropout: Annotated[
        float, ADDED, SHARE, Help("lora, weightlora: dropout on the input of the adapter; r-lora: on that of a head.")
    ] = 0.0
    target_modules: Annotated[
        tuple[str, ...],
        ADDED,
        Help("Layers to train: names (q_proj v_proj), globs on paths, or all-linear. Default: all.", "NAME ..."),
    ] = ()
    train_experts: Annotated[bool, ADDED, Help("Train the experts too; else they stay frozen.")] = False
    init_from: Annotated[
        Path | None, SAME_RESULT, Help("Start from the adapter of another run on the same quantized model.", "RUN")
    ] = None

    budget: Annotated[
        str | None,
        Group("16-bit-model"),
        SAME_RESULT,
        Help("Size of weights and components: 2.75bits per weight, or 20GB. Default: 4-bit NF4.", "SIZE"),
    ] = None
    allocation: Annotated[Allocation, SAME_RESULT] = None
    expert_rank: Annotated[ExpertRank, SAME_RESULT] = None
    include_towers: Annotated[IncludeTowers, SAME_RESULT] = False
    codec: Annotated[Format, SAME_RESULT] = "nf4"
    double_quant: Annotated[DoubleQuant, SAME_RESULT] = True
    head_bits: Annotated[HeadBits, SAME_RESULT] = None
    embedding_bits: Annotated[EmbeddingBits, SAME_RESULT] = None

    learning_rate: Annotated[
        float | None, Group("schedule"), ABOVE_ZERO, Help("Default: by the method, 2e-5 for pissa, 2e-4 for lora.")
    ] = None
    schedule: Annotated[Literal["cosine", "linear", "constant"], Help("Learning rate after the warm-up.")] = "cosine"
    warmup: Annotated[float, SHARE, Help("Warm-up ratio: fraction of steps.")] = 0.03
    epochs: Annotated[float, ABOVE_ZERO, Help("Passes over the data. More, with --resume, extend a run.")] = 1.0
    steps: Annotated[int | None, at_least(1), Help("Optimizer steps, instead of --epochs.")] = None
    batch_size: MicroBatch = 4
    accumulate: Accumulate = 4
    step_tokens: StepTokens = None

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
    precondition: Annotated[
        Literal["none", "riemannian"],
        ADDED,
        Help("Scale the gradients of each pair of factors by the inverse of the other's product with itself."),
    ] = "none"
    damping: Annotated[
        float, ADDED, ABOVE_ZERO, Help("Is added to the diagonals that --precondition inverts; the paper's 1e-6.")
    ] = 1e-6
    weight_decay: Annotated[float, FROM_ZERO, Help("Weight decay.")] = 0.0
    max_grad_norm: Annotated[float, FROM_ZERO, Help("Gradient clipping: maximum norm; 0: no clipping.")] = 1.0

    gradient_checkpointing: Annotated[Checkpointing, Group("memory"), SAME_RESULT] = "auto"
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

    def __post_init__(self) -> None:
        """Take True and False, as version 0.1 did, for yes and no."""
        if isinstance(self.gradient_checkpointing, bool):
            object.__setattr__(self, "gradient_checkpointing", "yes" if self.gradient_checkpointing else "no")


@dataclass(frozen=True)
class Train(TrainingOptions):
    """Train an adapter or the components of a quantized model; the residual stays frozen.

    A 16-bit MODEL is quantized first, into a folder next to RUN, which other runs use too. The same command continues a
    stopped run.
    """

    base: Annotated[
        str, SAME_RESULT, Group(""), POSITIONAL, Help("A quantized model, a 16-bit model, or a Hub id.", "MODEL")
    ]
    data: Annotated[Data, SAME_RESULT]
    out: Annotated[Path, SAME_RESULT, Help("Folder for checkpoints, adapter and summary.", "RUN")]

    shard: Annotated[
        Literal["no", "yes", "offload"],
        SAME_RESULT,
        Group("memory"),
        Help("Divide the residual among the processes of torchrun (FSDP2). offload: keep the parts in CPU memory."),
    ] = "no"

    quantized: Annotated[
        Path | None,
        Group("16-bit-model"),
        SAME_RESULT,
        Help("Folder for the quantized model. Default: next to RUN, named by the model, its bits and its rank.", "OUT"),
    ] = None

    save_every: Annotated[int, SAME_RESULT, Group("output"), at_least(1), Help("Steps between checkpoints.")] = 100
    keep: Annotated[int, SAME_RESULT, at_least(1), Help("Number of checkpoints to keep.")] = 2
    resume: Annotated[bool, SAME_RESULT, Help("Continue a run with more --steps or --epochs.")] = False
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
    batch_size: Annotated[
        MicroBatch, Help("Sequences per forward pass. auto: as many as make the shortest step.", aliases=("--batch",))
    ] = TrainingOptions.batch_size
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
    gpus: Annotated[
        int | None, at_least(2), Help("Compare the ways to train on so many GPUs of one machine, each of --gpu bytes.")
    ] = None
    interconnect: Annotated[
        Literal["nvlink", "pcie"] | float,
        INTERCONNECT,
        Help("Speed at which a GPU receives from the others: nvlink (360 GB/s), pcie (12.5), or a number of GB/s."),
    ] = "pcie"

    explore: Annotated[bool, Group("output"), Help("Print what fits: rank by sequence length by GPU memory.")] = False
    json: Json = False
