"""Options that exclude each other, or need another one, or a package that is not installed."""

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from qsvd.options.quantizing import Allocate, Calibrate, Quantize
from qsvd.options.training import Plan, Train, TrainingOptions
from qsvd.options.using import Aggregate, Eval, Generate, Report

TWO_FACTORS = ("lora", "dora", "lora-fa", "lora-ga", "melora", "cora", "delta-lora")  # methods that --rslora scales
WITH_DROPOUT = ("lora", "r-lora", "weightlora")  # methods that --dropout applies to
MOST_FOLDERS = 6  # of a page: more lines cannot be told apart
TRACKERS = {  # name -> packages of which transformers needs one
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}


def conflicts(options: object) -> list[str]:
    """Return a clause for every option that does not go with another one."""
    wrong = []
    if (
        isinstance(options, TrainingOptions | Quantize)
        and options.allocation is not None
        and options.budget is not None
    ):
        wrong.append("--budget and --allocation both set the bits of each layer: give one of them")
    if isinstance(options, TrainingOptions | Quantize):
        wrong += _conflicts_of_codec(options)
    if isinstance(options, Quantize | Allocate):
        wrong += _conflicts_of_objective(options) + _conflicts_of_texts(options)
    kinds: Any = {Quantize: _conflicts_of_quantize, Calibrate: _conflicts_of_calibrate, Eval: _conflicts_of_eval}
    kinds |= {TrainingOptions: _conflicts_of_training, Train: _conflicts_of_train, Generate: _conflicts_of_generate}
    kinds |= {Plan: _conflicts_of_gpus}
    kinds |= {Aggregate: _conflicts_of_aggregate, Report: _conflicts_of_report}
    return wrong + [clause for kind, find in kinds.items() if isinstance(options, kind) for clause in find(options)]


def _conflicts_of_calibrate(options: Calibrate) -> list[str]:
    wrong = []
    if options.chunk is not None and options.gradient_rank is not None:
        wrong.append("--chunk divides the examples, and --gradient-rank sums over all: give one of them")
    if options.include_towers and (options.traces or options.gradient_rank is not None):
        wrong.append("--include-towers measures Fisher information alone: leave out --traces and --gradient-rank")
    return wrong


def _conflicts_of_quantize(options: Quantize) -> list[str]:
    if options.budget is not None and options.dry_run:
        return [
            "--dry-run cannot show the result of a --budget before the layers are measured: run qsvd allocate, or "
            "qsvd plan --budget for the sizes alone"
        ]
    wrong = []
    if options.budget is None and options.allocator != "both":
        wrong.append(f"--allocator {options.allocator} needs a --budget")
    if options.budget is None and options.objective == "hessian":
        wrong.append("--objective hessian needs a --budget: it weights whole layers")
    return wrong


def _conflicts_of_codec(options: TrainingOptions | Quantize) -> list[str]:
    if options.codec == "nf4":
        return []
    others = {
        "--budget": options.budget is not None,
        "--allocation": options.allocation is not None,
        "--head-bits": options.head_bits is not None,
        "--embedding-bits": options.embedding_bits is not None,
        "--no-double-quant": not options.double_quant,
    }
    why = {
        "--budget": "sets the format of each layer",
        "--allocation": "sets the format of each layer",
        "--no-double-quant": "is for nf4",
    }
    usual = "needs qsvd's own format, which vLLM does not read"
    return [
        f"--codec {options.codec} cannot be used with {flag}, which {why.get(flag, usual)}: leave out one of them"
        for flag, is_given in others.items()
        if is_given
    ]


def _conflicts_of_texts(options: Quantize | Allocate) -> list[str]:
    quality = options.quality if isinstance(options, Quantize) else None
    if options.calibrate is None:
        wrong = ["--quality best needs texts: give --calibrate DATA"] if quality == "best" else []
        given = {
            "--sensitivity": options.sensitivity is not None,
            "--examples": options.examples != type(options).examples,
            "--max-length": options.max_length is not None,
        }
        return wrong + [f"{flag} needs --calibrate DATA" for flag, is_given in given.items() if is_given]
    wrong = []
    if quality == "fast":
        wrong.append("--quality fast uses no texts: leave out --calibrate, or give --quality good")
    if options.objective == "fisher":
        wrong.append("--calibrate and --objective fisher both weight errors: give one of them")
    return wrong


def _conflicts_of_objective(options: Quantize | Allocate) -> list[str]:
    name, has_file = options.objective, options.statistics is not None
    if name in ("fisher", "hessian") and not has_file:
        return [f"--objective {name} needs --statistics FILE, which qsvd calibrate writes; or omit --objective"]
    if name not in ("fisher", "hessian") and has_file:
        return [f"--statistics is for --objective fisher or hessian, and --objective is {name}; change one of them"]
    return []


def _conflicts_of_training(options: TrainingOptions) -> list[str]:
    wrong = []
    if options.layer_major and options.gradient_checkpointing == "no":
        wrong.append("--layer-major needs gradient checkpointing: leave out --no-gradient-checkpointing")
    of_methods = {"--dropout": (options.dropout > 0, WITH_DROPOUT), "--rslora": (options.rslora, TWO_FACTORS)}
    for flag, (is_given, methods) in of_methods.items():
        if is_given and options.method not in ("auto", *methods):
            able = " or ".join(methods)
            wrong.append(f"{flag} is for --method {able}, and --method is {options.method}: change one of them")
    comparing = {"--keep-best": options.keep_best, "--early-stopping": options.early_stopping is not None}
    if options.eval_every is None and any(comparing.values()):
        flags = " and ".join(flag for flag, is_given in comparing.items() if is_given)
        wrong.append(f"{flags} cannot be used without held-out losses to compare: give --eval-every N too")
    if options.precondition == "none" and options.damping != TrainingOptions.damping:
        wrong.append(f"--damping {options.damping:g} is for --precondition riemannian: give it too, or leave it out")
    if options.precondition != "none" and options.optimizer == "lora-rite":
        wrong.append("--optimizer lora-rite preconditions by itself: leave out --precondition riemannian")
    wrong += _conflicts_of_batches(options)
    return wrong


def _conflicts_of_train(options: Train) -> list[str]:
    wrong = _wrong_trackers(options.report_to)
    if options.shard != "no" and options.layer_major:
        wrong.append("--shard gathers a block for each batch, and --layer-major divides them: give one of them")
    if options.shard != "no" and options.resident != "auto":
        wrong.append(
            f"--resident {options.resident} keeps whole blocks on the GPU, and --shard {options.shard} keeps a part of "
            "each: give one of them"
        )
    return wrong


def _conflicts_of_gpus(options: Plan) -> list[str]:
    if options.gpus is None:
        is_given = options.interconnect != Plan.interconnect
        return [f"--interconnect {options.interconnect} is for several GPUs: give --gpus N too"] if is_given else []
    others = {
        f"--for {options.estimate}, which one GPU does": options.estimate not in ("auto", "train"),
        "--explore, a table of single GPUs": options.explore,
        f"--resident {options.resident}, which it chooses": options.resident != "auto",
        f"--device {options.device}": options.device.startswith("cpu"),
    }
    return [f"--gpus plans training on GPUs: leave out {flag}" for flag, is_given in others.items() if is_given]


def _conflicts_of_batches(options: TrainingOptions) -> list[str]:
    is_auto = options.batch_size == "auto"
    if is_auto and options.accumulate != TrainingOptions.accumulate:
        return [f"--accumulate {options.accumulate} is chosen by --batch-size auto: give --step-tokens N instead"]
    if not is_auto and options.step_tokens is not None:
        return [f"--step-tokens {options.step_tokens} needs --batch-size auto, and it is {options.batch_size}"]
    return []


def _wrong_trackers(names: Sequence[str]) -> list[str]:
    wrong = []
    for name in names:
        if name == "none":
            wrong.append("--report-to none is the default: leave it out")
        elif name not in TRACKERS:
            wrong.append(f"--report-to {name} is none of {', '.join(TRACKERS)}")
        elif not any(find_spec(package) for package in TRACKERS[name]):
            wrong.append(f"--report-to {name} needs the package {name}, which is not installed (pip install {name})")
    return wrong


def _conflicts_of_eval(options: Eval) -> list[str]:
    wrong = []
    if options.window is not None and options.stride is not None and options.stride > options.window:
        wrong.append(f"--stride {options.stride} is above --window {options.window}")
    if not options.models:
        wrong.append("no model is given: name at least one folder")
    return wrong


def _conflicts_of_aggregate(options: Aggregate) -> list[str]:
    wrong = []
    if len(options.runs) < 2:
        wrong.append(f"{' '.join(options.runs) or 'no run'} is given, and an average needs at least two runs")
    if options.weights and len(options.weights) != len(options.runs):
        wrong.append(f"--weights has {len(options.weights)} numbers for {len(options.runs)} runs: give one for each")
    return wrong


def _conflicts_of_report(options: Report) -> list[str]:
    wrong, count = [], len(options.folders)
    if not count:
        wrong.append("no folder is given: name at least one quantized model or run")
    if count > MOST_FOLDERS:
        wrong.append(f"{count} folders are given, and a page shows at most {MOST_FOLDERS}")
    if options.html is None and count > 1:
        wrong.append(f"{count} folders are given, and tables are of one: give --html for a page that compares them")
    if options.live and options.html is None:
        wrong.append("--live writes a page again: give --html too")
    if options.json and options.html is not None:
        wrong.append("--json and --html exclude each other: leave out one of them")
    return wrong


def _conflicts_of_generate(options: Generate) -> list[str]:
    wrong = []
    if options.chat and options.prompt:
        wrong.append("--chat reads its messages from stdin: leave out --prompt")
    if not (options.chat or options.prompt or options.audio) and sys.stdin.isatty():
        wrong.append("there is no prompt: give --prompt TEXT, --chat, or a text on stdin")
    if any(not prompt.strip() for prompt in options.prompt):
        wrong.append("--prompt is empty")
    for flag, is_given in {"--chat": options.chat, "--system": options.system is not None}.items():
        if options.raw and is_given:
            wrong.append(f"{flag} needs the chat template: leave out --raw")
    if options.temperature == 0 and options.top_p is not None:
        wrong.append(f"--top-p {options.top_p} needs sampling, and --temperature 0 is greedy: leave out one of them")
    return wrong
