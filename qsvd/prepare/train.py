"""Everything that a training run needs, opened and checked before anything slow."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.methods import METHODS
from qsvd.adapters.start import new_record, start_adapter
from qsvd.data.columns import Examples, Tokenized, recognise
from qsvd.data.read import read_pair, read_rows
from qsvd.data.row_files import Rows
from qsvd.data.tokens import tokenize
from qsvd.errors import BadInput, listing
from qsvd.files.adapter import AdapterRecord
from qsvd.files.split_folder import SplitFolder, open_split
from qsvd.memory.block_bytes import Batch
from qsvd.memory.device import device_of, dtype_of
from qsvd.memory.placement import Placed, Wish
from qsvd.memory.training import Training
from qsvd.options import Train
from qsvd.plan.weights import context_length
from qsvd.prepare.machine import machine, place_training, show_placement
from qsvd.training.settings import Settings, default_optimizer

# What `qsvd train` refuses before anything slow: numbers out of range, and options that do not go together.


TRACKERS = {  # name -> packages of which transformers needs one
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}
LAST_SEED = 2**32 - 1  # of NumPy's generator, which transformers seeds too


def check_options(options: Train, device: torch.device) -> None:
    """Everything that is wrong with the options alone, in one sentence.

    Raises:
        BadInput: numbers out of range, a tracker that is unknown or not installed, or no GPU to offload from.
    """
    wrong = _numbers_out_of_range(options) + [sentence for name in options.report_to for sentence in _tracker(name)]
    if options.activation_offload == "yes" and device.type == "cpu":
        wrong.append("--activation-offload needs a GPU, from which activations go to host memory")
    if options.layer_major and not options.gradient_checkpointing:
        wrong.append("--layer-major computes each batch of a block again: leave --no-gradient-checkpointing out")
    if options.layer_major and options.packing:
        wrong.append("--layer-major divides a step by its rows, and --packing makes one row of them: give one of them")
    if wrong:
        raise BadInput("; ".join(wrong))


def check_start_of(record: AdapterRecord, split: SplitFolder) -> None:
    """Start the adapter of one small weight for each stored rank, and forget it.

    Raises:
        BadInput: the method cannot start from this base with these options.
    """
    for rank in sorted({weight["rank"] for weight in split.weights.values()}):
        sizes = {name: math.prod(weight["shape"]) for name, weight in split.weights.items() if weight["rank"] == rank}
        start_adapter(split, record, min(sizes, key=lambda name: sizes[name]), torch.device("cpu"))


def check_kind(options: Train, examples: Examples) -> None:
    """Refuse, by ValueError, options that only language models have, where texts are labelled."""
    chosen = {"--packing": options.packing, "--activation-offload": options.activation_offload == "yes"}
    given = [flag for flag, is_on in chosen.items() if is_on]
    if examples.kind == "labelled" and given:
        raise BadInput(
            f"{examples.places.source} holds labelled texts, which train a classifier; {' and '.join(given)} "
            "can be used for language models only"
        )


def positions(split: SplitFolder) -> int:
    """Tokens that the model can read; a recurrent one has no limit."""
    from transformers import AutoConfig

    return context_length(AutoConfig.from_pretrained(split.folder, local_files_only=True))


def check_lengths(split: SplitFolder, tokenized: Sequence[Tokenized]) -> None:
    """Refuse, by ValueError, sequences that are longer than what the model can read."""
    limit = positions(split)
    long = [
        f"{one.where(index)} ({len(tokens)})"
        for one in tokenized
        for index, tokens in enumerate(one.input_ids)
        if len(tokens) > limit
    ]
    if long:
        raise BadInput(
            f"{len(long)} sequences have more tokens than the {limit} positions of the model: {listing(long)}; "
            f"give --max-length {limit}"
        )


def _numbers_out_of_range(options: Train) -> list[str]:
    least: Mapping[str, float | None] = {
        "rank": options.rank,
        "batch-size": options.batch_size,
        "accumulate": options.accumulate,
        "save-every": options.save_every,
        "keep": options.keep,
    }
    wrong = [f"--{name} {value} is below 1" for name, value in least.items() if value is not None and value < 1]
    if options.max_length is not None and options.max_length < 2:
        wrong.append(f"--max-length {options.max_length} is below 2")
    above_zero = {
        "alpha": options.alpha,
        "learning-rate": options.learning_rate,
        "epochs": options.epochs,
        "steps": options.steps,
    }
    wrong += [
        f"--{name} {value} is no number above 0"
        for name, value in above_zero.items()
        if value is not None and not 0 < value < math.inf
    ]
    from_zero = {"weight-decay": options.weight_decay, "max-grad-norm": options.max_grad_norm}
    wrong += [
        f"--{name} {value} is no number from 0 up" for name, value in from_zero.items() if not 0 <= value < math.inf
    ]
    shares = {"warmup": options.warmup, "held-out": options.held_out}
    wrong += [f"--{name} {value} is no share from 0 to below 1" for name, value in shares.items() if not 0 <= value < 1]
    if options.resident != "auto" and not 0 <= options.resident <= 1:
        wrong.append(f"--resident {options.resident} is neither auto nor a share from 0 to 1")
    return wrong + ([] if 0 <= options.seed <= LAST_SEED else [f"--seed {options.seed} is outside 0..{LAST_SEED}"])


def _tracker(name: str) -> list[str]:
    if name not in TRACKERS:
        return [f"--report-to {name} is none of {', '.join(TRACKERS)}"]
    if not any(find_spec(package) for package in TRACKERS[name]):
        return [f"--report-to {name} needs the package {name}, which is not installed (pip install {name})"]
    return []


MOST_LENGTH = 1024  # tokens of a sequence, unless more are asked for
MOST_HELD_OUT = 256  # examples, where none are given
APART = (
    *("base", "data", "valid", "out", "save_every", "keep", "resume", "report_to", "preview", "dry_run", "any_start"),
    *("resident", "gpu", "host", "activation_offload"),
)


@dataclass(frozen=True)
class RunJob:
    """A training run, checked."""

    options: Train
    split: SplitFolder
    record: AdapterRecord
    adapter_options: AdapterOptions
    tokenizer: Any
    data: Tokenized
    held_out: Tokenized | None
    settings: Settings
    device: torch.device
    dtype: torch.dtype
    placed: Placed

    @property
    def out(self) -> Path:
        return self.options.out.expanduser()

    @property
    def resident(self) -> str:
        """What of the 4-bit weights stays on the device, in words."""
        return show_placement(self.placed.placement, self.split)

    @property
    def identity(self) -> dict[str, Any]:
        """What the bytes of the adapter depend on."""
        options = {name: value for name, value in asdict(self.options).items() if name not in APART}
        data = {"data": _digest(self.data), "held_out": self.held_out and _digest(self.held_out)}
        return options | {"device": self.device.type, "base_fingerprint": self.split.fingerprint} | data


def prepare_run(options: Train) -> RunJob:
    """Open the base and the data, tokenize, and refuse what cannot be trained.

    Raises:
        BadInput: an option, the base or the data is not usable.
        DoesNotFit: there is too little memory, wherever the weights are.
    """
    device = device_of(options.device)
    check_options(options, device)
    there = machine(device, dtype_of(options.dtype, device), gpu=options.gpu, host=options.host)
    split = open_split(options.base.expanduser())
    if options.max_length is None:
        options = replace(options, max_length=min(MOST_LENGTH, positions(split)))
    method = None if options.method == "auto" else options.method
    adapter_options = AdapterOptions(method, options.rank, options.alpha, options.adapter_dtype, options.seed)
    record = new_record(split, adapter_options)
    check_start_of(record, split)
    tokenizer = open_tokenizer(split.folder)
    data, held_out = _data(options, tokenizer, split)
    check_lengths(split, [data] if held_out is None else [data, held_out])
    if data.label_names:
        record = new_record(split, adapter_options, data.label_names)
    settings = _settings(options, record.method, device)
    placed = place_training(split, record, _training(settings, data, device), _wish(options, data), there)
    settings = replace(settings, activation_offload=placed.placement.activation_offload)
    return RunJob(
        options=options,
        split=split,
        record=record,
        adapter_options=adapter_options,
        tokenizer=tokenizer,
        data=data,
        held_out=held_out,
        settings=settings,
        device=device,
        dtype=there.dtype,
        placed=placed,
    )


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer of a base, which can pad.

    Raises:
        BadInput: the folder has none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{folder} has no tokenizer that transformers can open; copy the source's files there"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def mapping_of(pairs: tuple[str, ...]) -> dict[str, str]:
    """--map COLUMN=NAME as a dictionary; a ValueError names what is no such pair."""
    wrong = [pair for pair in pairs if not all(pair.partition("=")[::2])]
    if wrong:
        raise BadInput(f"--map {' '.join(wrong)} is no COLUMN=NAME, such as --map query=question reply=answer")
    return dict(pair.split("=", 1) for pair in pairs)


def stop_ids(folder: Path) -> tuple[int, ...]:
    """Tokens that end generation, by generation_config.json."""
    path = folder / "generation_config.json"
    ends = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    return tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)


def _data(options: Train, tokenizer: Any, split: SplitFolder) -> tuple[Tokenized, Tokenized | None]:
    """What is trained and what is held out."""
    mapping = mapping_of(options.map)
    train, valid = _rows(options)
    examples = recognise(train, mapping)
    check_kind(options, examples)
    others = recognise(valid, mapping) if valid is not None else None
    if others is not None and others.kind != examples.kind:
        raise BadInput(f"{others.places.source} holds {others.kind} examples, {examples.places.source} {examples.kind}")
    data = _tokenize(examples, options, tokenizer, split, None)
    if others is not None:
        return data, _tokenize(others, options, tokenizer, split, data.label_names or None)
    return _hold_out(data, options)


def _rows(options: Train) -> tuple[Rows, Rows | None]:
    if options.valid is not None:
        return read_rows(options.data, split=options.split), read_rows(
            options.valid, split="train" if Path(options.valid).expanduser().is_file() else "valid"
        )
    if options.split != "train":
        return read_rows(options.data, split=options.split), None
    return read_pair(options.data)


def _tokenize(
    examples: Examples, options: Train, tokenizer: Any, split: SplitFolder, names: tuple[str, ...] | None
) -> Tokenized:
    assert options.max_length is not None, "chosen by now"
    return tokenize(
        examples,
        tokenizer,
        max_length=options.max_length,
        loss_on=options.loss_on,
        stop_ids=stop_ids(split.folder),
        label_names=names,
    )


def _hold_out(data: Tokenized, options: Train) -> tuple[Tokenized, Tokenized | None]:
    """A share of the sequences, drawn by the seed, and the rest."""
    total = len(data.input_ids)
    count = min(MOST_HELD_OUT, max(1, round(options.held_out * total))) if options.held_out else 0
    if not count or count >= total:
        return data, None
    order = torch.randperm(total, generator=torch.Generator().manual_seed(options.seed)).tolist()
    return _take(data, sorted(order[count:])), _take(data, sorted(order[:count]))


def _take(data: Tokenized, indexes: list[int]) -> Tokenized:
    return replace(
        data,
        input_ids=[data.input_ids[index] for index in indexes],
        labels=[data.labels[index] for index in indexes],
        places=data.places.take(indexes),
        token_types=data.token_types and [data.token_types[index] for index in indexes],
    )


def _settings(options: Train, method: str, device: torch.device) -> Settings:
    names = Settings.__dataclass_fields__
    chosen: dict[str, Any] = {name: value for name, value in asdict(options).items() if name in names}
    chosen["activation_offload"] = False  # until the planner has said
    if options.learning_rate is None:
        chosen["learning_rate"] = METHODS[method].defaults.learning_rate
    if options.optimizer == "auto":
        chosen["optimizer"] = default_optimizer(device)
    return Settings(**chosen)


def _training(settings: Settings, data: Tokenized, device: torch.device) -> Training:
    """What the planner is to count: the longest sequences that there are."""
    lengths = {len(tokens) for tokens in data.input_ids}
    rows = settings.batch_size * (settings.accumulate if settings.layer_major else 1)  # padded to one length
    is_masked = settings.packing or (rows > 1 and len(lengths) > 1)
    tokens = settings.max_length if settings.packing else max(lengths)
    batch = Batch(tokens, settings.batch_size, is_masked, settings.gradient_checkpointing, device.type)
    is_language = not data.label_names
    return Training(batch, settings.accumulate, settings.optimizer, settings.layer_major, has_loss=is_language)


def _wish(options: Train, data: Tokenized) -> Wish:
    return Wish(options.resident, "no" if data.label_names else options.activation_offload)


def _digest(data: Tokenized) -> str:
    """SHA-256, in hex, over tokens, labels and the names of the labels."""
    return hashlib.sha256(json.dumps([data.input_ids, data.labels, data.label_names]).encode()).hexdigest()
