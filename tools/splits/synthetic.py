"""Large random matrices with the spectra of language models: their splits at 4 bits and rank 64, in float32.

W is that of tools/make_model: singular values that decrease by a power law above heavy-tailed noise, and some larger
columns. H and G have eigenvalues that decrease as 1 / number above a floor. The inputs have a few outlier channels, and
the sizes of the gradients are log-normal. H and G are exact here, so that calibration and held-out text are the same.

Shape suffixes: S = features of a side, K = eigenvalues above the floor, O = out features, I = in features.
"""

from collections.abc import Callable, Sequence

import torch
from random_weights import draw_weight, generator_of
from splits.methods import ENTRIES_OF_LARGE, Measure, apply
from splits.published import Weight
from splits.rows import Row, Table, markdown
from torch import Tensor

SHAPES = ((4096, 4096), (4096, 14336))
BITS, RANK = 4, 64
EIGENVALUES = 1024  # above the floor, or a quarter of the side
FLOOR = 0.05  # of the mean eigenvalue, about
LARGEST = 8  # the largest eigenvalue is the side over this
OUTLIERS, OUTLIER_GAIN = 6, 10.0  # channels of the inputs, and how much larger they are
GRADIENT_SPREAD = 1.0  # standard deviation of the logarithms of the gradients' sizes


def compare(table: Table, scale: int, tell: Callable[..., None]) -> None:
    """Add the missing rows.

    Args:
        scale: Divides the sides and the rank.
    """
    for shape in SHAPES:
        rows, columns = (side // scale for side in shape)
        keys = {"kind": "matrix", "shape": f"{rows} x {columns}", "width": BITS}
        wanted = [
            (entry, rank)
            for entry in ENTRIES_OF_LARGE
            if not table.has(**keys, method=entry.name, rank=(rank := RANK // scale if entry.takes(RANK) else 0))
        ]
        if not wanted:
            continue
        tell(f"{rows} x {columns}: W, H and G")
        weight = drawn(rows, columns)
        measure = Measure(weight.weight_OI, {"drawn": (weight.inputs_II, weight.outputs_OO)})
        for entry, rank in wanted:
            outcome = apply(entry, weight, BITS, rank)
            bits = 8 * outcome.num_bytes / (rows * columns)
            found = measure.errors(outcome.error_OI)
            table.add([{**keys, "method": entry.name, "rank": rank, "bits": bits, **found, "seconds": outcome.seconds}])
            tell(f"{rows} x {columns}", entry.name, found, f"{outcome.seconds:.0f} s")


def drawn(rows: int, columns: int) -> Weight:
    """Return a weight with its moments, float32; the Fisher information is that of independent inputs and gradients."""
    weight_OI = draw_weight((rows, columns), generator_of(0, "weight", torch.device("cpu")), torch.float32)
    generator = generator_of(0, "gains", torch.device("cpu"))
    gains_I = torch.ones(columns)
    gains_I[torch.randperm(columns, generator=generator)[:OUTLIERS]] = OUTLIER_GAIN
    gains_O = torch.exp(GRADIENT_SPREAD * torch.randn(rows, generator=generator))
    inputs_II, outputs_OO = moment(gains_I, "inputs"), moment(gains_O, "outputs")
    return Weight(weight_OI, inputs_II, outputs_OO, outputs_OO.diagonal(), inputs_II.diagonal())


def moment(gains_S: Tensor, name: str) -> Tensor:
    """Return a second moment [S, S] whose features are multiplied by gains."""
    side = len(gains_S)
    count = min(EIGENVALUES, side // 4)
    values_K = side / LARGEST / torch.arange(1, count + 1)
    parts_SK = torch.randn(side, count, generator=generator_of(0, name, torch.device("cpu"))) * (values_K / side).sqrt()
    parts_SK *= gains_S[:, None]
    moment_SS = parts_SK @ parts_SK.T
    moment_SS.diagonal().add_(FLOOR * gains_S.square())
    return moment_SS


def tables(rows: Sequence[Row]) -> str:
    """Return a table in Markdown for each shape."""
    order = [entry.name for entry in ENTRIES_OF_LARGE]
    parts = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        some = sorted((row for row in rows if row["shape"] == shape), key=lambda row: order.index(row["method"]))
        parts.append(f"## Random matrix, {shape}, {BITS} bits\n\n{markdown(some, ('rank', 'method'))}")
    return "\n".join(parts)
