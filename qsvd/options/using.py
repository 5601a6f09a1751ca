"""The options of the commands that use a model: measure, generate, export, report, demo; and of methods."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from qsvd.option_types import (
    ABOVE_ZERO,
    ALL_ABOVE_ZERO,
    APPEND,
    FROM_ZERO,
    POSITIONAL,
    SEED,
    TOP_P,
    Base,
    BatchSize,
    ComputeDtype,
    DataSplit,
    Device,
    Group,
    Help,
    Json,
    Map,
    Public,
    PushToHub,
    Resident,
    Seed,
    ShardSize,
    at_least,
)


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
    continues. Without --prompt, --audio and --chat it is read from stdin. Answers go to stdout, all else to stderr.
    """

    model: Annotated[str, POSITIONAL, Help("A 16-bit model, a quantized model, a run, or a Hub id.", "MODEL")]
    prompt: Annotated[tuple[str, ...], APPEND, Help("May be given several times. Default: stdin.", "TEXT")] = ()
    image: Annotated[
        tuple[str, ...],
        APPEND,
        Help("An image before the prompt, for an image-language model. May be given several times.", "FILE"),
    ] = ()
    audio: Annotated[
        tuple[str, ...],
        APPEND,
        Help("A WAV file, for a model that hears; Whisper writes what is said. May be given several times.", "FILE"),
    ] = ()
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
        Literal["peft", "lora", "merged", "compressed-tensors"],
        Help(
            "peft: adapter for the residual; lora: adapter for the original 16-bit model; merged: 16-bit weights; "
            "compressed-tensors: 4-bit weights for vLLM."
        ),
    ]
    base: Base = None
    original: Annotated[
        str | None,
        Help(
            "For lora: the 16-bit model. Default: where it was when it was quantized. For lora and merged, after "
            "qsvd prune: the model that was pruned.",
            "MODEL",
        ),
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
class Aggregate:
    """Average several runs on one quantized model, into a run.

    The products B A are averaged, not B and A; --rank leaves out the smallest singular values of the average.
    """

    runs: Annotated[tuple[str, ...], POSITIONAL, Help("Runs of qsvd train on one quantized model.", "RUN ...")]
    out: Annotated[Path, Help("Folder for the average. The same command continues a stopped one.", "RUN")]
    rank: Annotated[
        int | None,
        at_least(1),
        Help("Rank of the average. Default: the highest one of the runs. The sum of their ranks leaves out nothing."),
    ] = None
    weights: Annotated[
        tuple[float, ...],
        ALL_ABOVE_ZERO,
        Help("Weight of each run, such as its number of examples. Default: all alike.", "NUMBER ..."),
    ] = ()
    base: Base = None


@dataclass(frozen=True)
class Report:
    """Show the quantization error of a quantized model, or write a page for quantized models and runs.

    A page of several folders shows them side by side. It is one HTML file that needs no network.
    """

    folders: Annotated[
        tuple[Path, ...], POSITIONAL, Help("A quantized model; for a page also runs, and several folders.", "DIR ...")
    ]
    html: Annotated[
        Path | None,
        Help(
            "Write a page to this file, *.html. Default of FILE: report.html in the first folder.", "FILE", bare="auto"
        ),
    ] = None
    live: Annotated[bool, Help("Write the page again every few seconds until the runs are finished.")] = False
    json: Json = False
    worst: Annotated[int, at_least(0), Help("Number of worst layers to list.")] = 10


@dataclass(frozen=True)
class Verify:
    """Check that the files of a model, a run or an export are as qsvd wrote them."""

    path: Annotated[Path, POSITIONAL, Help("A folder that qsvd wrote, or a file of it.", "DIR")]
    accept: Annotated[
        bool, Help("For a quantized model: accept config and tokenizer files that you changed as they are now.")
    ] = False


@dataclass(frozen=True)
class Methods:
    """List the methods of qsvd train: trained parameters, start, export, learning rate, paper."""

    json: Json = False


@dataclass(frozen=True)
class Demo:
    """Quantize a small built-in model at several ranks, compare perplexity, and fine-tune it by three methods."""

    out: Annotated[Path, Help("Output folder.", "DIR")] = Path("build/demo")
    ranks: Annotated[tuple[int, ...], Help("Ranks to try.", "N ...")] = (0, 16, 32, 64)
    tokens: Annotated[int, Help("Tokens of the held-out text.")] = 20_000
    epochs: Annotated[float, ABOVE_ZERO, Help("Passes over the fine-tuning text.")] = 2.0
