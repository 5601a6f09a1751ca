"""Does a better start survive training? The embedded model is trained from several splits, by qsvd's commands.

Every split has rank 16, or rank 0 and a new LoRA of rank 16, so that all end with the same bytes. The
learning rate of a method is the best of three by the loss on validation text at seed 0. The table has the loss on a
test part that chose nothing: before training, and after it as the median over the seeds at that rate.
"""

import contextlib
import io
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from splits.methods import CODECS
from splits.models import linear_layers
from splits.rows import Row, Table
from transformers import AutoModelForCausalLM

from qsvd.cli import run
from qsvd.commands.demo import MODEL, fine_tuning_data

RANK, SEEDS = 16, (0, 1, 2)
TEST_SHARE = 0.2  # of the text to train on, its end
LENGTH = ("--steps", 24, "--batch-size", 4, "--accumulate", 1, "--max-length", 256)
FIXED = ("--no-gradient-checkpointing", "--device", "cpu", "--save-every", 10**6)
CALIBRATION = ("--max-length", 256)
LORA = ("--method", "lora", "--rank", RANK, "--alpha", RANK)
PISSA = ("--method", "pissa")
Words = Sequence[object]


@dataclass(frozen=True)
class Start:
    """A quantized model to train from: rank, options of qsvd quantize and of qsvd train, and learning rates.

    Args:
        is_calibrated: Whether it is quantized with the text to train on.
    """

    rank: int
    quantize: Words
    train: Words
    rates: tuple[float, ...]
    is_calibrated: bool = False


STARTS = {
    "NF, LoRA": Start(0, (), LORA, (3e-3, 1e-2, 2e-2)),
    "qsvd, H and G, LoRA": Start(0, ("--quality", "best"), LORA, (3e-3, 1e-2, 2e-2), is_calibrated=True),
    "QPiSSA-5": Start(RANK, ("--order", "svd", "--end", "quantize", "--iterations", 5), PISSA, (1e-3, 3e-3, 6e-3)),
    "qsvd, no data": Start(RANK, ("--quality", "good"), PISSA, (1e-3, 3e-3, 6e-3)),
    "qsvd, H and G": Start(RANK, ("--quality", "best"), PISSA, (1e-3, 3e-3, 6e-3), is_calibrated=True),
}


def compare(table: Table, folder: Path, tell: Callable[..., None]) -> None:
    """Add the missing rows: of the 16-bit model and of every split before training, and of every run."""
    data = texts(folder / "data")
    if not table.has(method="16 bits"):
        table.add([{"method": "16 bits", "before": loss(MODEL, data / "test.txt")}])
    for width in CODECS:
        for name, start in STARTS.items():
            base = folder / f"{width}-{name.replace(', ', '-').replace(' ', '-')}"
            keys = {"method": name, "width": width}
            if not table.has(**keys, kind="base"):
                make_base(base, width, start, data)
                table.add([{**keys, "kind": "base", "before": loss(base, data / "test.txt")}])
            runs = [(rate, SEEDS[0]) for rate in start.rates]
            for rate, seed in runs:
                train(table, keys, base, data, rate, seed)
                if len(runs) == len(start.rates) and (rate, seed) == runs[-1]:
                    runs += [(best_rate(table, keys), seed) for seed in SEEDS[1:]]
            tell(width, name, *cells(table.rows, keys))


def texts(folder: Path) -> Path:
    """Write train.txt, valid.txt and test.txt of the book of qsvd demo; return their folder."""
    fine_tuning_data(folder)
    text = (folder / "train.txt").read_text(encoding="utf-8")
    cut = text.index("\n", round((1 - TEST_SHARE) * len(text)))
    (folder / "train.txt").write_text(text[:cut], encoding="utf-8")
    (folder / "test.txt").write_text(text[cut:].lstrip(), encoding="utf-8")
    return folder


def make_base(base: Path, width: int, start: Start, data: Path) -> None:
    """Quantize the embedded model, all layers with one codec and rank."""
    shutil.rmtree(base, ignore_errors=True)
    allocation = base.with_suffix(".txt")
    lines = (
        f"{layer} {CODECS[width]} {start.rank}\n"
        for layer in linear_layers(AutoModelForCausalLM.from_pretrained(MODEL))
    )
    allocation.write_text("".join(("# qsvd allocation\n", "weight codec rank\n", *lines)), encoding="utf-8")
    calibration = ("--calibrate", data / "train.txt", *CALIBRATION) if start.is_calibrated else ()
    words = (*start.quantize, *calibration)
    qsvd("quantize", MODEL, "--out", base, "--allocation", allocation, "--device", "cpu", *words)


def train(table: Table, keys: Row, base: Path, data: Path, rate: float, seed: int) -> None:
    """Train and test one run, if it has no row yet."""
    keys = {**keys, "kind": "run", "rate": rate, "seed": seed}
    if table.has(**keys):
        return
    out = base.with_name(f"{base.name}-run")
    shutil.rmtree(out, ignore_errors=True)
    start = STARTS[keys["method"]]
    words = (*start.train, *LENGTH, *FIXED, "--learning-rate", rate, "--seed", seed)
    qsvd("train", base, data, "--out", out, *words)
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    found = {"valid": summary["held_out_after"], "after": loss(out, data / "test.txt")}
    table.add([{**keys, **found}])


def best_rate(table: Table, keys: Row) -> float:
    """Return the rate with the least loss on validation text at the first seed."""
    found = [row for row in table.rows if (row.items() >= {**keys, "kind": "run", "seed": SEEDS[0]}.items())]
    return min(found, key=lambda row: row["valid"])["rate"]


def loss(model: object, text: Path) -> float:
    """Return nats a token, as qsvd eval measures them."""
    words = ("--window", 256, "--stride", 256, "--json")
    found = json.loads(qsvd("eval", model, "--data", text, *words))
    return math.log(found["models"][0]["perplexity"])


def qsvd(*words: object) -> str:
    """Run `qsvd WORDS`; return what it prints to stdout."""
    shown, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(said):
        code = run([str(word) for word in words])
    if code:
        raise SystemExit(f"qsvd {' '.join(map(str, words))}: {said.getvalue()}")
    return shown.getvalue()


def cells(rows: Sequence[Row], keys: Row) -> list[str]:
    """Return what the table shows of a method at one width."""
    some = [row for row in rows if row.items() >= keys.items()]
    before = next(row["before"] for row in some if row["kind"] == "base")
    runs = [row for row in some if row["kind"] == "run"]
    first = {row["rate"]: row["valid"] for row in runs if row["seed"] == SEEDS[0]}
    if not first:
        return [f"{before:.4f}"]
    best = min(first, key=lambda rate: first[rate])
    after = [row["after"] for row in runs if row["rate"] == best]
    swept = ", ".join(f"{rate:g}: {valid:.4f}" for rate, valid in first.items())
    spread = f"{min(after):.4f} to {max(after):.4f}"
    return [f"{before:.4f}", f"{median(after):.4f}", spread, f"{best:g}", swept]


def tables(rows: Sequence[Row]) -> str:
    """Return a table in Markdown of all widths."""
    heads = ("bits", "method", "before", "after (median)", "seeds", "rate", "validation loss by rate (seed 0)")
    lines = [" | ".join(heads), "---: | --- | ---: | ---: | --- | ---: | ---"]
    lines += [f"16 | 16 bits | {row['before']:.4f} | | | | " for row in rows if row["method"] == "16 bits"]
    groups: dict[tuple[Any, str], None] = {(row["width"], row["method"]): None for row in rows if "width" in row}
    for width, method in groups:
        lines.append(" | ".join((str(width), method, *cells(rows, {"width": width, "method": method}))))
    body = "".join(f"| {line} |\n" for line in lines)
    return f"## Training from several splits, the embedded model\n\n{body}" if rows else ""
