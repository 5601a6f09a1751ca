"""Checks of ranges, conflicts, sizes and paths of options. They import no torch: the command line refuses a mistake at
once, before it imports the command."""

from collections.abc import Sequence
from pathlib import Path

from qsvd.data.read import local_data
from qsvd.data.template_names import read_template
from qsvd.errors import BadInput, listing, parse_size
from qsvd.files.atomic import read_record
from qsvd.files.quantized.manifest import check_quantized, read_manifest
from qsvd.files.workspace import (
    ADAPTER_RECORD,
    ADAPTER_SEALED,
    ANOTHER_FOLDER,
    IDENTITY,
    MANIFEST,
    UNFINISHED,
    check_begun,
    model_kind,
    settled,
)
from qsvd.inputs.paths import checkpoint_folder, local_path
from qsvd.option_types import out_of_range
from qsvd.options import (
    Aggregate,
    Allocate,
    Calibrate,
    Compare,
    Demo,
    Eval,
    Export,
    Generate,
    Methods,
    Plan,
    Prune,
    Quantize,
    Report,
    Train,
    TrainingOptions,
    Verify,
)
from qsvd.options.conflicts import conflicts
from qsvd.plan.targets import check_targets, target_names

Options = (
    Aggregate
    | Allocate
    | Calibrate
    | Compare
    | Demo
    | Eval
    | Export
    | Generate
    | Methods
    | Plan
    | Prune
    | Quantize
    | Report
    | Train
    | Verify
)

LEAST_SHARD = 10**5  # bytes of one output file


def check(options: Options, *, is_open: bool = False) -> None:
    """Check ranges, options that exclude each other, sizes and paths.

    Args:
        is_open: Whether the model is open already, so that its name is not a path.

    Raises:
        BadInput: the options cannot be used (the sentence names every fault), or a path cannot.
    """
    _check_texts(options)
    wrong = out_of_range(options) + conflicts(options)
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


def _check_texts(options: Options) -> None:
    """Refuse paths and texts that are not UTF-8: files cannot name them, and tokenizers cannot open them."""
    wrong = []
    for name, value in {**vars(options), "the current folder": Path.cwd()}.items():
        for text in map(str, value if isinstance(value, tuple) else (value,)):
            try:
                text.encode()
            except UnicodeEncodeError:
                wrong.append(f"{name} {text!r}")
    if wrong:
        raise BadInput(f"not a text in UTF-8: {'; '.join(wrong)}; give the file or folder another name")


def _check_files(options: Options) -> None:
    """Refuse files of options that cannot be read."""
    for source in (getattr(options, name, None) for name in ("data", "valid", "calibrate")):
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


def _check_models(options: Options, *, is_open: bool) -> None:
    """Refuse models that are neither here nor on the Hub."""
    match options:
        case _ if is_open:
            pass
        case Quantize() | Allocate() | Calibrate() | Prune() | Compare():
            checkpoint_folder(options.model)
        case Plan(model=name) | Train(base=name):
            _check_trained(options, name)
        case Report(folders=folders, html=None):
            _check_reported(folders[0])
        case Eval() | Generate():
            named = (*options.models, options.reference) if isinstance(options, Eval) else (options.model,)
            for name in filter(None, named):
                model_kind(name)
        case Export() | Aggregate():
            _check_runs(options)
        case _:
            pass


def _check_reported(folder: Path) -> None:
    """Refuse to report what is not a complete quantized model."""
    if not folder.expanduser().exists():
        raise BadInput(f"no folder {folder} here; give a quantized model, which qsvd quantize or qsvd train wrote")
    if (folder.expanduser() / ADAPTER_RECORD).is_file():
        base = read_record(folder.expanduser() / ADAPTER_RECORD, since=ADAPTER_SEALED).get("base", "OUT")
        raise BadInput(
            f"{folder} is a run of qsvd train: qsvd report {folder} --html makes a page of it; for the quantization "
            f"error give its quantized model: qsvd report {base}"
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
        "--codec": options.codec != "nf4",
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
            weights = read_manifest(manifest.parent)["weights"].values()
            modules = [weight["module"] for weight in weights if not weight.get("tower")]
            check_targets(target_names(options.target_modules), modules)


def _check_config(name: str) -> None:
    path = local_path(name)
    if path is None or (path.is_file() and path.suffix == ".json"):
        return
    if model_kind(name) == "trained":
        raise BadInput(f"{name} is a run of qsvd train: give its quantized model, or its 16-bit model")


def _check_runs(options: Export | Aggregate) -> None:
    if isinstance(options, Aggregate):
        _check_averaged(options.runs)
        return
    run = options.run
    if not run.expanduser().exists():  # a Hub id would be downloaded, and then refused
        raise BadInput(f"no folder {run} here; give a run of qsvd train, or a quantized model")
    if model_kind(str(run)) == "16-bit":
        raise BadInput(f"{run} is a 16-bit model, and needs no export; give a run of qsvd train, or a quantized model")


def _check_averaged(runs: Sequence[str]) -> None:
    """Refuse to average what is not a run."""
    absent = [name for name in runs if not Path(name).expanduser().exists()]
    if absent:  # a Hub id would be downloaded, and then refused
        raise BadInput(f"no folder {listing(absent)} here; give runs of qsvd train")
    others = {name: model_kind(name) for name in runs if model_kind(name) != "trained"}
    if others:
        words = {"split": "a quantized model", "16-bit": "a 16-bit model"}
        found = listing([f"{name} is {words[kind]}" for name, kind in others.items()], separator="; ")
        raise BadInput(f"{found}; give runs of qsvd train")


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
        settled(out, lambda: None if (out / IDENTITY).is_file() else check_begun(out))
