"""`qsvd demo`: quantize the embedded model at several ranks, report, compare perplexity, fine-tune in three ways."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from rich.table import Table

from qsvd.commands.quantize import quantize
from qsvd.commands.report import show_report
from qsvd.commands.train import train
from qsvd.console.progress import terminal
from qsvd.errors import BadInput
from qsvd.evaluate.perplexity import Perplexity, perplexity_of_text
from qsvd.files.atomic import write_text
from qsvd.files.split_folder import open_split
from qsvd.inputs.model_files import MODEL as MODEL_FILES
from qsvd.inputs.model_files import TOKENIZER, from_folder
from qsvd.options import Demo, Quantize, Train

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
    """Run `qsvd demo`: 1 quantize at every rank, 2 print report and perplexity, 3 fine-tune and print the losses."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not options.ranks or options.tokens < WINDOW:
        raise BadInput(f"--ranks needs at least one rank, and --tokens at least {WINDOW}, not {options.tokens}")
    text = HELD_OUT.read_text(encoding="utf-8")
    tokens = from_folder(AutoTokenizer, MODEL, TOKENIZER)(text, verbose=False).input_ids[: options.tokens]
    model = from_folder(AutoModelForCausalLM, MODEL, MODEL_FILES, dtype=torch.float32)
    base = _perplexity(model, tokens)
    columns = ("model", "bits per weight", "error", "perplexity", "change")
    table = Table(*columns, title="Quantized model at several ranks", title_justify="left")
    table.add_row("16-bit", "16.00", "0", f"{base.perplexity:.3f}", "0 %")
    ranks = sorted(set(options.ranks))
    for rank in ranks:
        quantized = quantize(Quantize(str(MODEL), out=_folder(options, rank), rank=rank, device="cpu"))
        _install(model, quantized.path)
        here = _perplexity(model, tokens)
        name = f"NF4 + {rank} components" if rank else "NF4"
        lost = 100 * (here.perplexity / base.perplexity - 1)
        table.add_row(
            name, f"{quantized.bits:.2f}", f"{quantized.error:.4f}", f"{here.perplexity:.3f}", f"{lost:+.2f} %"
        )
    console = terminal()
    show_report(_folder(options, ranks[-1]), worst=3)
    console.print()
    console.print(table)
    console.print(
        f"{base.tokens} tokens of novels that are not in the training data; folders are in {options.out}\n",
        soft_wrap=True,
    )
    console.print(_fine_tune(options))
    console.print("Loss in nats per token on the end of a book; the rest of the book was the training data.")


def _fine_tune(options: Demo) -> Table:
    """Fine-tune in every way and return a table of the losses."""
    data = fine_tuning_data(options.out.expanduser() / "book")
    columns = ("method", "parameters", "rate", "before", "after", "seconds")
    table = Table(*columns, title="Fine-tuning: loss before and after", title_justify="left")
    for way in WAYS:
        base = quantize(Quantize(str(MODEL), out=_folder(options, way.base_rank), rank=way.base_rank, device="cpu"))
        run = train(
            Train(
                base=str(base),
                data=str(data),
                out=options.out.expanduser() / f"run-{way.method}",
                method=way.method,
                rank=way.rank,
                alpha=way.rank,  # the learning rate was found with a scale of 1
                learning_rate=way.learning_rate,
                epochs=options.epochs,
                batch_size=4,
                accumulate=2,
                max_length=256,
                gradient_checkpointing="no",
                device="cpu",
            )
        )
        found = run.summary
        numbers = (f"{loss:.4f}" for loss in (found.held_out_before, found.held_out_after))
        count = f"{found.trained_parameters:,}"
        table.add_row(way.name, count, f"{way.learning_rate:g}", *numbers, f"{found.seconds:.0f}")
    return table


def _folder(options: Demo, rank: int) -> Path:
    return options.out.expanduser() / f"rank-{rank}"


def _perplexity(model: "PreTrainedModel", tokens: list[int]) -> Perplexity:
    return perplexity_of_text(model, tokens, window=WINDOW, stride=WINDOW // 2)


def _install(model: "PreTrainedModel", folder: Path) -> None:
    """Replace every weight W by Q + B A, in float32."""
    split = open_split(folder)
    for name in split.weights:
        model.get_parameter(name).data.copy_(split.dense(name))


def fine_tuning_data(folder: Path) -> Path:
    """Write train.txt and valid.txt, a book that the embedded model was not trained on, and return their folder."""
    text = FINE_TUNING.read_text(encoding="utf-8")
    cut = text.index("\n", round((1 - VALID_SHARE) * len(text)))
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "train.txt", text[:cut])
    write_text(folder / "valid.txt", text[cut:].lstrip())
    return folder
