"""The file of gradients that a method starts from: whether it belongs to a quantized model and has what is trained."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.methods.table import METHODS
from qsvd.errors import BadInput, listing
from qsvd.files.statistics import Statistics, most_rank, open_statistics
from qsvd.plan.targets import is_expert, is_target


def starts_from_gradients(method: str | None) -> bool:
    """Return whether a method starts from gradients of the 16-bit model."""
    return method is not None and METHODS[method].starts_from_gradient


def gradients_digest(file: Path) -> str | None:
    """Return a SHA-256 of all that the gradients of a file depend on; None if there is no such file."""
    if not file.is_file():
        return None
    statistics = open_statistics(file)
    made = json.dumps([statistics.fingerprint, statistics.record.get("run")], sort_keys=True)
    return hashlib.sha256(made.encode()).hexdigest()


def open_gradients(
    method: str, options: AdapterOptions, fingerprint: str, shapes: Mapping[str, tuple[int, int]]
) -> Statistics | None:
    """Open the file of gradients that a new adapter starts from; None for a method that starts without.

    Args:
        fingerprint: `Checkpoint.fingerprint` of the 16-bit model.
        shapes: Of the quantized weights, by the paths of their layers.

    Raises:
        BadInput: no file is given, it has no gradients or those of another model, or they lack layers or ranks.
    """
    if not starts_from_gradients(method):
        return None
    file: Any = METHODS[method].own(options).gradients
    trained = {module: shape for module, shape in shapes.items() if is_target(module, options.target_modules)}
    rank = METHODS[method].defaults.rank_of(options, 0)
    make = f"qsvd calibrate MODEL DATA --gradient-rank {rank} --out FILE"
    if file is None:
        raise BadInput(f"{method} starts from gradients of the 16-bit model: give --gradients FILE ({make} writes it)")
    statistics = open_statistics(Path(file).expanduser())
    if statistics.fingerprint != fingerprint:
        raise BadInput(
            f"{statistics.path} has the gradients of another model ({statistics.record.get('model')}) than the 16-bit "
            f"model that is quantized; run {make} on this one"
        )
    found = {module: statistics.gradient_rank(module) for module in trained}
    if not any(found.values()):
        raise BadInput(f"{statistics.path} has no gradients; run {make}")
    experts = [module for module in trained if is_expert(module)]
    if experts:
        raise BadInput(
            f"{method} trains no experts ({listing(experts)}), of which qsvd calibrate keeps no gradients; leave out "
            "--train-experts, or use --method lora"
        )
    lacking = [module for module in trained if not found[module]]
    if lacking:
        raise BadInput(
            f"{statistics.path} has no gradients of {len(lacking)} of {len(trained)} layers ({listing(lacking)}); run "
            "qsvd calibrate with the same --include and --exclude, or choose layers with --target-modules"
        )
    low = [module for module, shape in trained.items() if found[module] < most_rank(rank, shape)]
    if low:
        most = max(found.values())
        raise BadInput(
            f"{statistics.path} has gradients of rank {most}, and the rank to train is {rank}; give --rank {most}, or "
            f"run {make}"
        )
    return statistics
