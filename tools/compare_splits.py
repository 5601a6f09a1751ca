"""Compare the splits of the literature with those of qsvd at equal bytes: tools/compare_splits [--models demo]

Every linear layer of small models is split by every method, at every width and rank. A table for each model and width
has the errors on calibration text and on held-out text (means over the layers), and the quality of the model with all
layers replaced. --synthetic: large random matrices instead. --train: does a better start survive training?

Rows are kept in FOLDER/*.jsonl, also those of single matrices. A stopped run continues; --again METHOD repeats a
method. FOLDER/tables.md is made of all rows that are there.
"""

import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Annotated

import torch
import tyro
from splits import synthetic, training
from splits.methods import CODECS, ENTRIES, Entry, Measure, apply
from splits.models import TEXTS, Sequences, Statistics, Subject
from splits.published import Weight
from splits.rows import Row, Table, cells, markdown
from tyro.conf import arg

HEAD = """\
- **Format:** all methods write the same blocks and levels: nf4 with float32 scales for 64 weights; nf3-64-fp16;
  nf2-32-fp16. Components have 16 bits. "Half the block size" spends bytes on scales instead of components.
- **Methods of the literature** are our implementations of the papers' formulas, in float64 (in float32 for the large
  random matrices), with the largest magnitudes as scales. LQ-LoRA has the Fisher information by rows and columns.
  "CLoQ-like" is GPTQ and the exact components of its error in the norm of H. "CALDERA-like" alternates GPTQ and such
  components, starts from the components of W, and keeps its best pass; it has neither the Hadamard transform nor the
  lattice codebook of the paper.
- **Errors** are relative, means over the layers. Frobenius: ||E|| / ||W||. Output: sqrt(tr(E H E^T) / tr(W H W^T)),
  H = E[x x^T] of the inputs of the 16-bit model. H and G: sqrt(tr(G E H E^T) / tr(G W H W^T)), G = E[g g^T] of the
  gradients at the outputs, of the loss with labels drawn from the model's predictions. minilm-l6 has no loss: there g
  is the gradient of the final hidden states times Gaussian noise, which gives the Gauss-Newton matrix of their squared
  error.
- **Whole model:** all linear layers of the blocks replaced; on held-out text. KL divergence is from the 16-bit model,
  in nats a token.
- **Texts:** stories260K: 70 stories to calibrate, 30 held out. Embedded model (demo): a novel to calibrate, three other
  novels held out. minilm-l6: training and development sentences of SST-2.
- **Seconds** are those of the process, with other work on the machine; qsvd's are float32. They show orders of
  magnitude only.
"""
SHARE = 4  # of the width of a model: the largest rank


@dataclass(frozen=True)
class Options:
    """What is compared."""

    models: tuple[str, ...] = tuple(TEXTS)
    bits: tuple[int, ...] = (4, 3, 2)
    ranks: Annotated[tuple[int, ...], arg(help="Above a quarter of a model's width they are left out.")] = (
        0,
        8,
        16,
        64,
    )
    methods: Annotated[tuple[str, ...], arg(help="Names as in the tables. Default: all.")] = ()
    again: Annotated[tuple[str, ...], arg(help="Methods whose rows are made again.")] = ()
    synthetic: Annotated[bool, arg(help="Split large random matrices instead.")] = False
    train: Annotated[bool, arg(help="Train the embedded model from several splits instead.")] = False
    scale: Annotated[int, arg(help="Divide the sides of the synthetic matrices, to try the script.")] = 1
    shared: Annotated[Path, arg(help="Folder with models/ and data/.")] = Path("../shared")
    folder: Path = Path("build/compare_splits")
    seed: int = 0


def main() -> None:
    """Make the rows that are missing, then the tables."""
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(1)
    models = Table(options.folder / "models.jsonl", options.again)
    large = Table(options.folder / "synthetic.jsonl", options.again)
    trained = Table(options.folder / "trained.jsonl", options.again)
    if options.synthetic:
        synthetic.compare(large, options.scale, tell)
    elif options.train:
        training.compare(trained, options.folder.absolute() / "runs", tell)
    else:
        for name in options.models:
            compare(options, name, models)
    names = ("torch", "transformers", "bitsandbytes")
    head = f"{platform.machine()} CPU, one thread; {', '.join(f'{name} {version(name)}' for name in names)}\n"
    parts = [head, HEAD, *tables(models.rows), synthetic.tables(large.rows), training.tables(trained.rows)]
    (options.folder / "tables.md").write_text("\n".join(part for part in parts if part), encoding="utf-8")
    print(options.folder / "tables.md")


def tell(*words: object) -> None:
    """Print progress."""
    print(*words, file=sys.stderr, flush=True)


def compare(options: Options, name: str, table: Table) -> None:
    """Add the missing rows of one model."""
    wanted = [
        (entry, bits, rank)
        for entry, bits, rank in settings(options)
        if not table.has(kind="model", model=name, method=entry.name, width=bits, rank=rank)
    ]
    if not wanted:
        return
    tell(name, "statistics")
    subject = Subject(name, options.shared)
    if not table.has(kind="reference", model=name):
        tokens = {"calibration": total(subject.calibration), "held out": total(subject.held_out)}
        found = asdict(subject.quality({}))
        table.add([{"kind": "reference", "model": name, "method": "16 bits", **tokens, **found}])
    calibration = subject.statistics(subject.calibration, options.seed)
    held_out = subject.statistics(subject.held_out, options.seed + 1)
    weights = {
        layer: Weight(weight_OI.double(), *vars(calibration[layer]).values())
        for layer, weight_OI in subject.weights.items()
    }
    measures = {layer: measure_of(weight, calibration[layer], held_out[layer]) for layer, weight in weights.items()}
    for entry, bits, rank in wanted:
        if SHARE * rank > subject.width:
            continue
        keys = {"model": name, "method": entry.name, "width": bits, "rank": rank}
        rows, replaced = [], {}
        for layer, weight in weights.items():
            outcome = apply(entry, weight, bits, rank)
            replaced[layer] = (weight.weight_OI - outcome.error_OI).float()
            found = measures[layer].errors(outcome.error_OI)
            sizes = {"layer": layer, "numbers": weight.weight_OI.numel(), "bytes": outcome.num_bytes}
            rows.append({"kind": "matrix", **keys, **sizes, **found, "seconds": outcome.seconds})
        row = {"kind": "model", **keys, **over_layers(rows), **asdict(subject.quality(replaced))}
        table.add([*rows, row])
        tell(*keys.values(), *(f"{head} {shown}" for head, shown in cells(row).items()))


def total(sequences: Sequences) -> int:
    """Return the number of tokens."""
    return sum(map(len, sequences))


def measure_of(weight: Weight, calibration: Statistics, held_out: Statistics) -> Measure:
    """Return the measure of one layer on both texts."""
    texts = {"calibration": calibration, "held out": held_out}
    return Measure(weight.weight_OI, {name: (found.inputs_II, found.outputs_OO) for name, found in texts.items()})


def settings(options: Options) -> Iterator[tuple[Entry, int, int]]:
    """Yield method, bits and rank of every row."""
    for bits in options.bits:
        for rank in options.ranks:
            for entry in ENTRIES:
                if entry.takes(rank) and (not options.methods or entry.name in options.methods):
                    yield entry, bits, rank


def over_layers(rows: list[Row]) -> Row:
    """Return means of the errors, and sums of bytes and seconds."""
    found: Row = {key: mean(row[key] for row in rows) for key in rows[0] if key.startswith(("frob", "output", "loss"))}
    found["bits"] = 8 * sum(row["bytes"] for row in rows) / sum(row["numbers"] for row in rows)
    found["seconds"] = sum(row["seconds"] for row in rows)
    return found


def tables(rows: list[Row]) -> Iterator[str]:
    """Yield a table in Markdown for each model and width."""
    found = [row for row in rows if row["kind"] == "model"]
    order = [entry.name for entry in ENTRIES]
    for model in dict.fromkeys(row["model"] for row in found):
        for bits in CODECS:
            some = [row for row in found if row["model"] == model and row["width"] == bits]
            some.sort(key=lambda row: (row["rank"], order.index(row["method"])))
            if some:
                yield f"## {model}, {bits} bits ({CODECS[bits]})\n"
                yield from (described(row) for row in rows if row["kind"] == "reference" and row["model"] == model)
                yield markdown(some, ("rank", "method"))


def described(row: Row) -> str:
    """Return a paragraph on the 16-bit model and its texts."""
    texts = f"{row['calibration']:,} tokens to calibrate, {row['held out']:,} held out"
    quality = "" if row["perplexity"] is None else f"; perplexity of the 16-bit model {row['perplexity']:.3f}"
    return f"{texts}{quality}.\n"


if __name__ == "__main__":
    main()
