"""Checks of the options alone, and of the paths in them. They import no torch: the command line refuses a mistake at
once, before it imports the command."""

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qsvd.data.read import local_data
from qsvd.data.template_names import read_template
from qsvd.errors import BadInput, listing, parse_size
from qsvd.files.atomic import read_object
from qsvd.files.workspace import (
    ADAPTER_RECORD,
    ANOTHER_FOLDER,
    IDENTITY,
    LOCK,
    MANIFEST,
    UNFINISHED,
    check_empty,
    check_quantized,
    model_kind,
)
from qsvd.option_types import out_of_range
from qsvd.options import (
    Allocate,
    Calibrate,
    Demo,
    Eval,
    Export,
    Generate,
    Methods,
    Plan,
    Quantize,
    Report,
    Train,
    TrainingOptions,
)
from qsvd.paths import checkpoint_folder, local_path
from qsvd.plan.targets import check_targets, target_names

Options = Allocate | Calibrate | Demo | Eval | Export | Generate | Methods | Plan | Quantize | Report | Train

TWO_FACTORS = ("lora", "dora", "lora-fa", "lora-ga")  # methods that --rslora scales
LEAST_SHARD = 10**5  # bytes of one output file
TRACKERS = {  # name -> packages of which transformers needs one
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}


def check(options: Options, *, is_open: bool = False) -> None:
    """Check ranges, options that exclude each other, sizes and paths.

    Args:
        is_open: Whether the model is open already, so that its name is not a path.

    Raises:
        BadInput: the options cannot be used (the sentence names every fault), or a path cannot.
    """
    wrong = out_of_range(options) + _conflicts(options)
    if isinstance(options, TrainingOptions) and options.rank == 0 and wrong:
        wrong.append("a rank of 0 trains nothing: for QLoRA give --method lora, whose quantized model has rank 0")
    if wrong:
        raise BadInput("; ".join(wrong))
    for name, least in {"gpu": 1, "host": 1, "shard_size": LEAST_SHARD}.items():
        size = getattr(options, name, None)
        if size is not None:
            parse_size(size, f"--{name.replace('_', '-')}", least=least)
    _check_models(options, is_open=is_open)
    _check_targets(options)
    _check_files(options)
    _check_output(options)
    _check_hub(options)


def _check_files(options: Options) -> None:
    """Refuse files of options that cannot be read."""
    for source in (getattr(options, "data", None), getattr(options, "valid", None)):
        if source is not None:
            local_data(source)
    table: Path | None = getattr(options, "allocation", None)
    if table is not None and not table.expanduser().is_file():
        raise BadInput(f"--allocation {table} cannot be read: there is no such file")
    statistics: Path | None = getattr(options, "statistics", None)
    if statistics is not None and not statistics.expanduser().is_file():
        raise BadInput(f"{statistics} does not exist; qsvd calibrate MODEL DATA --out {statistics} makes it")
    template: str | None = getattr(options, "chat_template", None)
    if template is not None:
        read_template(template)
    first: Path | None = getattr(options, "init_from", None)
    if first is not None and not (first.expanduser() / ADAPTER_RECORD).is_file():
        raise BadInput(f"--init-from {first} holds no trained adapter; give the folder of a run of qsvd train")


def _check_hub(options: Options) -> None:
    """Refuse a name that the Hub does not allow, and an upload without a token."""
    name: str | None = getattr(options, "push_to_hub", None)
    if name is None:
        if getattr(options, "public", False):
            raise BadInput("--public is for --push-to-hub NAME: give both")
        return
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise BadInput(
            f"--push-to-hub {name!r} is not a name of the Hub, which looks like owner/name and has letters, digits and "
            "- _ . only"
        ) from error
    if get_token() is None:
        raise BadInput("--push-to-hub needs a token of the Hub: run `hf auth login`, or set HF_TOKEN")


def _conflicts(options: Options) -> list[str]:
    """Return a clause for every option that does not go with another one."""
    wrong = []
    if (
        isinstance(options, TrainingOptions | Quantize)
        and options.allocation is not None
        and options.budget is not None
    ):
        wrong.append("--budget and --allocation both set the bits of each layer: give one of them")
    if isinstance(options, Quantize | Allocate):
        wrong += _conflicts_of_objective(options)
    kinds: Any = {Quantize: _conflicts_of_quantize, Calibrate: _conflicts_of_calibrate, Eval: _conflicts_of_eval}
    kinds |= {TrainingOptions: _conflicts_of_training, Generate: _conflicts_of_generate}
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
    of_methods = {"--dropout": (options.dropout > 0, ("lora",)), "--rslora": (options.rslora, TWO_FACTORS)}
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
    if options.layer_major and options.packing:
        wrong.append("--layer-major needs several rows per step, and --packing makes one: give one of them")
    return wrong + (_wrong_trackers(options.report_to) if isinstance(options, Train) else [])


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


def _conflicts_of_generate(options: Generate) -> list[str]:
    wrong = []
    if options.chat and options.prompt:
        wrong.append("--chat reads its messages from stdin: leave out --prompt")
    if not options.chat and not options.prompt and sys.stdin.isatty():
        wrong.append("there is no prompt: give --prompt TEXT, --chat, or a text on stdin")
    if any(not prompt.strip() for prompt in options.prompt):
        wrong.append("--prompt is empty")
    for flag, is_given in {"--chat": options.chat, "--system": options.system is not None}.items():
        if options.raw and is_given:
            wrong.append(f"{flag} needs the chat template: leave out --raw")
    if options.temperature == 0 and options.top_p is not None:
        wrong.append(f"--top-p {options.top_p} needs sampling, and --temperature 0 is greedy: leave out one of them")
    return wrong


def _check_models(options: Options, *, is_open: bool) -> None:
    """Refuse models that are neither here nor on the Hub."""
    match options:
        case _ if is_open:
            pass
        case Quantize() | Allocate() | Calibrate():
            checkpoint_folder(options.model)
        case Plan(model=name) | Train(base=name):
            _check_trained(options, name)
        case Report(folder=folder):
            _check_reported(folder)
        case Eval() | Generate():
            named = (*options.models, options.reference) if isinstance(options, Eval) else (options.model,)
            for name in filter(None, named):
                model_kind(name)
        case Export():
            _check_exported(options.run)
        case _:
            pass


def _check_reported(folder: Path) -> None:
    """Refuse to report what is not a complete quantized model."""
    if not folder.expanduser().exists():
        raise BadInput(f"no folder {folder} here; give a quantized model, which qsvd quantize or qsvd train wrote")
    if (folder.expanduser() / ADAPTER_RECORD).is_file():
        base = read_object(folder.expanduser() / ADAPTER_RECORD).get("base", "OUT")
        raise BadInput(
            f"{folder} is a run of qsvd train, described in {folder / 'README.md'}; for the quantization error give "
            f"its quantized model: qsvd report {base}"
        )
    check_quantized(folder.expanduser())


def _check_trained(options: Plan | Train, name: str) -> None:
    """Refuse to plan or train what is neither a complete quantized model nor a 16-bit model."""
    if isinstance(options, Plan):
        _check_config(name)
    else:
        kind, folder = model_kind(name), local_path(name)
        if kind == "trained":
            raise BadInput(
                f"{name} is a run of qsvd train: give its quantized model, and --init-from {name} to start from its "
                "adapter"
            )
        if kind == "16-bit" and folder is not None:
            if (folder / UNFINISHED).is_dir():
                check_quantized(folder)
            checkpoint_folder(name)
    _check_quantizing(options, name)


def _check_quantizing(options: TrainingOptions, name: str) -> None:
    """Refuse options for a 16-bit model where the model is quantized already, and the reverse."""
    folder = local_path(name)
    if folder is None or not (folder / MANIFEST).is_file():
        if options.init_from is not None:
            raise BadInput(f"--init-from needs the quantized model of that run, and {name} is a 16-bit model")
        return
    chosen = {
        "--budget": options.budget is not None,
        "--allocation": options.allocation is not None,
        "--expert-rank": options.expert_rank is not None,
        "--include-towers": options.include_towers,
        "--no-double-quant": not options.double_quant,
        "--head-bits": options.head_bits is not None,
        "--embedding-bits": options.embedding_bits is not None,
        "--quantized": isinstance(options, Train) and options.quantized is not None,
    }
    if given := [flag for flag, is_given in chosen.items() if is_given]:
        raise BadInput(f"{name} is quantized already, and {listing(given)} can be used for 16-bit models only")


def _check_targets(options: Options) -> None:
    """Refuse names of layers to train that a quantized model does not have."""
    if isinstance(options, Train | Plan) and options.target_modules:
        manifest = Path(options.model if isinstance(options, Plan) else options.base).expanduser() / MANIFEST
        if manifest.is_file():
            weights = read_object(manifest)["weights"].values()
            modules = [weight["module"] for weight in weights if not weight.get("tower")]
            check_targets(target_names(options.target_modules), modules)


def _check_config(name: str) -> None:
    path = local_path(name)
    if path is None or (path.is_file() and path.suffix == ".json"):
        return
    if model_kind(name) == "trained":
        raise BadInput(f"{name} is a run of qsvd train: give its quantized model, or its 16-bit model")


def _check_exported(run: Path) -> None:
    if not run.expanduser().exists():  # a Hub id would be downloaded, and then refused
        raise BadInput(f"no folder {run} here; give a run of qsvd train, or a quantized model")
    if model_kind(str(run)) == "16-bit":
        raise BadInput(f"{run} is a 16-bit model, and needs no export; give a run of qsvd train, or a quantized model")


def _check_output(options: Options) -> None:
    """Refuse an output folder that is a file, and an output file that is a folder."""
    out: Path | None = getattr(options, "out", None)
    if isinstance(options, Train):
        _check_run(options)
    if out is None or not out.expanduser().exists():
        return
    file = {Allocate: "allocation.txt", Calibrate: "statistics.safetensors"}.get(type(options))
    is_folder = out.expanduser().is_dir()
    if file is not None and is_folder:
        raise BadInput(f"--out {out} is a folder; give a file, such as {out / file}")
    if file is None and not is_folder:
        raise BadInput(f"--out {out} is not a folder; give another name")


def _check_run(options: Train) -> None:
    """Refuse a folder for the run that holds something else, and --resume where there is nothing to continue."""
    out = options.out.expanduser()
    is_run = (out / IDENTITY).is_file()
    if (out / MANIFEST).is_file():
        raise BadInput(f"--out {options.out} is a quantized model, and a run needs its own folder; {ANOTHER_FOLDER}")
    if options.resume and not is_run:
        raise BadInput(f"--resume: there is no run in {options.out} to continue; leave out --resume to start one")
    if out.is_dir() and not is_run:
        check_empty(out, {LOCK}, "qsvd train")
