"""`qsvd methods`: list the methods of `qsvd train --method`; every cell comes from the class of the method."""

import json
import sys
from dataclasses import asdict, dataclass

from rich.table import Table

from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.methods.families import assign, num_trained
from qsvd.adapters.methods.table import METHODS, export_refusal
from qsvd.console.progress import say, terminal
from qsvd.options import Methods, Quantize
from qsvd.plan.weights import WeightSpec, role_of

MODEL = "Llama-3.1-8B"
BLOCKS, HEAD_SIZE = 32, 128
SHAPES = {  # [out, in] of the linear layers of a block of MODEL
    **{"self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096)},
    **{"self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096)},
    "mlp.down_proj": (4096, 14336),
}
FORMS = ("peft", "lora", "merged")  # of qsvd export --to
NEXT = "qsvd train --method lora --help  # the options of a method, here lora"


@dataclass(frozen=True)
class MethodRow:
    """What is printed of a method.

    Args:
        rank: The default trained rank; of a method that takes the stored rank, the default of `qsvd quantize`.
        trained_parameters: Of all linear layers of MODEL at that rank.
        export: What the adapter is for other tools: "PEFT LoRA", "PEFT DoRA", "merged only" or "none".
        refused: Forms of `qsvd export --to` that it does not have, with the reason.
        paper: arXiv number.
    """

    name: str
    trained_parameters: int
    rank: int
    is_stored_rank: bool
    starts_as: str
    export: str
    refused: dict[str, str]
    learning_rate: float
    reason: str
    paper: str


def main(options: Methods) -> None:
    """Print the methods to stdout, as a table or as JSON."""
    rows = [row_of(name) for name in METHODS]
    if options.json:
        say(json.dumps({"model": MODEL, "methods": [asdict(row) for row in rows]}, indent=2))
        return
    terminal().print(table_of(rows))
    say(f"trained: parameters, of all linear layers of {MODEL} at the default rank (*: the rank of the components)")
    say("starts as: the trained part before the first step; what is added leaves the components frozen")
    say("export: what qsvd export --to peft writes; rate: the default learning rate")
    for (form, why), names in refusals(rows).items():
        say(f"qsvd export --to {form} refuses {', '.join(names)}: {why}")
    say(f"Next: {NEXT}", file=sys.stderr)


def refusals(rows: list[MethodRow]) -> dict[tuple[str, str], list[str]]:
    """Return the methods that have no export, by its form and the reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for form, why in row.refused.items():
            found.setdefault((form, why.replace(row.name, "the method", 1)), []).append(row.name)
    return found


def row_of(name: str) -> MethodRow:
    """Return what is printed of the method with this name."""
    kind = METHODS[name]
    rank = kind.defaults.rank_of(AdapterOptions(name), Quantize.rank)
    refused = {form: why for form in FORMS if (why := export_refusal(name, form)) is not None}
    export = "PEFT DoRA" if kind.has_gain else "PEFT LoRA"
    if "peft" in refused:
        export = "none" if "merged" in refused else "merged only"
    return MethodRow(
        name=name,
        trained_parameters=trained_parameters(name),
        rank=rank,
        is_stored_rank=kind.defaults.rank is None,
        starts_as=kind.starts_as,
        export=export,
        refused=refused,
        learning_rate=kind.defaults.learning_rate,
        reason=kind.defaults.reason,
        paper=kind.paper,
    )


def trained_parameters(name: str) -> int:
    """Return how many parameters a method trains of all linear layers of MODEL, by default."""
    modules = {f"model.layers.{n}.{end}": shape for n in range(BLOCKS) for end, shape in SHAPES.items()}
    specs = [WeightSpec(f"{path}.weight", path, shape, role_of(path), 0) for path, shape in modules.items()]
    ranks, options = dict.fromkeys(modules, Quantize.rank), AdapterOptions(name)
    return num_trained(options, specs, ranks, assign(options, specs, ranks, HEAD_SIZE))


def table_of(rows: list[MethodRow]) -> Table:
    """Return a table with a row for each method."""
    heads = ("method", "trained", "rank", "starts as", "export", "rate", "arXiv")
    table = Table(*heads, title="Methods of qsvd train", title_justify="left", pad_edge=False)
    for column in (1, 2, 5):
        table.columns[column].justify = "right"
    table.columns[3].min_width = len("components,")
    for column in (0, 1, 2, 5, 6):
        table.columns[column].no_wrap = True
    for row in rows:
        rank = f"{row.rank}{'*' if row.is_stored_rank else ''}"
        numbers = (f"{row.trained_parameters:,}", rank, row.starts_as, row.export, _short(row.learning_rate))
        table.add_row(row.name, *numbers, row.paper)
    return table


def _short(rate: float) -> str:
    """Return 0.0002 as 2e-4, which leaves room on a terminal of 80 columns."""
    digits, exponent = f"{rate:e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"
