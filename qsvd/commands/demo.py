"""`qsvd demo`: the embedded model through quantize, report and held-out perplexity, at several ranks; then fine-tuned
on a book that it has not seen, by three methods."""

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from rich.console import Console
from rich.table import Table

from qsvd.commands.quantize import quantize
from qsvd.commands.report import load_report, show_report
from qsvd.commands.train import train
from qsvd.errors import BadInput
from qsvd.evaluate.perplexity import Perplexity, perplexity_of_text
from qsvd.files.atomic import write_text
from qsvd.files.split_folder import open_split
from qsvd.options import Demo, Quantize, Train
from qsvd.report.totals import relative, totals

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WINDOW = 512  # tokens; the context that the embedded model was trained for
MODEL = Path(str(files("qsvd.demo") / "model"))
HELD_OUT = Path(str(files("qsvd.demo") / "heldout.txt"))
FINE_TUNING = Path(str(files("qsvd.demo") / "finetune.txt"))
VALID_SHARE = 0.1  # of the fine-tuning text, its end


@dataclass(frozen=True)
class FineTuning:
    """One way to fine-tune, at the learning rate that docs/results found best for it."""

    name: str
    base_rank: int
    method: Literal["pissa", "lora", "edora"]
    rank: int | None
    learning_rate: float


WAYS = (
    FineTuning("QPiSSA, rank 16", 16, "pissa", None, 3e-3),
    FineTuning("QLoRA, rank 16", 0, "lora", 16, 1e-2),
    FineTuning("EDoRA, rank 64", 64, "edora", None, 1e-2),
)


def main(options: Demo) -> None:
    """Print the report at the highest rank, a table over all ranks, and one over ways to fine-tune."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not options.ranks or options.tokens < WINDOW:
        raise BadInput(f"--ranks needs at least one rank, and --tokens at least {WINDOW}, not {options.tokens}")
    text = HELD_OUT.read_text(encoding="utf-8")
    tokens = AutoTokenizer.from_pretrained(MODEL)(text, verbose=False).input_ids[: options.tokens]
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    base = _perplexity(model, tokens)
    table = Table("model", "bits", "error", "perplexity", "lost", title="What 4 bits cost", title_justify="left")
    table.add_row("16-bit", "16.00", "0", f"{base.perplexity:.3f}", "0 %")
    ranks = sorted(set(options.ranks))
    for rank in ranks:
        folder = quantize(Quantize(str(MODEL), out=_folder(options, rank), rank=rank, device="cpu"))
        _install(model, folder)
        here = _perplexity(model, tokens)
        whole = totals(load_report(folder)[1])[-1]
        name = f"NF4 + {rank} components" if rank else "NF4"
        lost = 100 * (here.perplexity / base.perplexity - 1)
        table.add_row(
            name, f"{whole.bits:.2f}", f"{relative(whole)[1]:.4f}", f"{here.perplexity:.3f}", f"{lost:+.2f} %"
        )
    console = Console()
    show_report(_folder(options, ranks[-1]), worst=3)
    console.print()
    console.print(table)
    console.print(
        f"{base.tokens} tokens of novels that the model has not seen; results in {options.out}\n", soft_wrap=True
    )
    console.print(_fine_tune(options))
    console.print(
        "Nats per token on the end of a book that the model has not seen, of which it was trained on the rest."
    )


def _fine_tune(options: Demo) -> Table:
    """Train in every way, and say what came of it."""
    data = fine_tuning_data(options.out.expanduser() / "book")
    table = Table("method", "trained", "rate", "before", "after", "seconds", title="Fine-tuned", title_justify="left")
    for way in WAYS:
        base = quantize(Quantize(str(MODEL), out=_folder(options, way.base_rank), rank=way.base_rank, device="cpu"))
        run = train(
            Train(
                base=base,
                data=str(data),
                out=options.out.expanduser() / f"run-{way.method}",
                method=way.method,
                rank=way.rank,
                learning_rate=way.learning_rate,
                epochs=options.epochs,
                batch_size=4,
                accumulate=2,
                max_length=256,
                gradient_checkpointing=False,
                resume=True,
                device="cpu",
            )
        )
        summary = json.loads((run / "summary.json").read_text())
        numbers = (f"{summary[f'held_out_{when}']:.4f}" for when in ("before", "after"))
        count = f"{summary['trained_parameters']:,}"
        table.add_row(way.name, count, f"{way.learning_rate:g}", *numbers, f"{summary['seconds']:.0f}")
    return table


def _folder(options: Demo, rank: int) -> Path:
    return options.out.expanduser() / f"rank-{rank}"


def _perplexity(model: "PreTrainedModel", tokens: list[int]) -> Perplexity:
    return perplexity_of_text(model, tokens, window=WINDOW, stride=WINDOW // 2)


def _install(model: "PreTrainedModel", folder: Path) -> None:
    """Put Q + B A of every weight, in float32, in the place of W."""
    split = open_split(folder)
    for name in split.weights:
        model.get_parameter(name).data.copy_(split.dense(name))


def fine_tuning_data(folder: Path) -> Path:
    """A folder with train.txt and valid.txt: a book that the embedded model has not seen."""
    text = FINE_TUNING.read_text(encoding="utf-8")
    cut = text.index("\n", round((1 - VALID_SHARE) * len(text)))
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "train.txt", text[:cut])
    write_text(folder / "valid.txt", text[cut:].lstrip())
    return folder
