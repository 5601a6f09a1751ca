"""What `qsvd train` refuses before anything slow: numbers out of range, and options that do not go together."""

import math
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

import torch

from qsvd.adapters.start import start_adapter
from qsvd.checkpoint.adapter_folder import AdapterRecord
from qsvd.checkpoint.read_split import SplitFolder
from qsvd.options import Train
from qsvd.plan.listing import listing
from qsvd.train.columns import Examples
from qsvd.train.tokenized import Tokenized

TRACKERS = {  # name -> packages of which transformers needs one
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}
LAST_SEED = 2**32 - 1  # of NumPy's generator, which transformers seeds too


def check_options(options: Train, device: torch.device) -> None:
    """Everything that is wrong with the options alone, in one sentence.

    Raises:
        ValueError: numbers out of range, a tracker that is unknown or not installed, or no GPU to offload from.
    """
    wrong = _numbers_out_of_range(options) + [sentence for name in options.report_to for sentence in _tracker(name)]
    if options.activation_offload == "yes" and device.type == "cpu":
        wrong.append("--activation-offload needs a GPU, from which activations go to host memory")
    if options.layer_major and not options.gradient_checkpointing:
        wrong.append("--layer-major computes each batch of a block again: leave --no-gradient-checkpointing out")
    if options.layer_major and options.packing:
        wrong.append("--layer-major divides a step by its rows, and --packing makes one row of them: give one of them")
    if wrong:
        raise ValueError("; ".join(wrong))


def check_start_of(record: AdapterRecord, split: SplitFolder) -> None:
    """Start the adapter of one small weight for each stored rank, and forget it.

    Raises:
        ValueError: the method cannot start from this base with these options.
    """
    for rank in sorted({weight["rank"] for weight in split.weights.values()}):
        sizes = {name: math.prod(weight["shape"]) for name, weight in split.weights.items() if weight["rank"] == rank}
        start_adapter(split, record, min(sizes, key=lambda name: sizes[name]), torch.device("cpu"))


def check_kind(options: Train, examples: Examples) -> None:
    """Refuse, by ValueError, options that only language models have, where texts are labelled."""
    chosen = {"--packing": options.packing, "--activation-offload": options.activation_offload == "yes"}
    given = [flag for flag, is_on in chosen.items() if is_on]
    if examples.kind == "labelled" and given:
        raise ValueError(
            f"{examples.places.source} holds labelled texts, which train a classifier; {' and '.join(given)} "
            "can be used for language models only"
        )


def positions(split: SplitFolder) -> int:
    """Tokens that the model can read; a recurrent one has no limit."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(split.folder, local_files_only=True).get_text_config()
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


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
        raise ValueError(
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
