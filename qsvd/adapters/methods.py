"""The methods by name: one line each."""

from collections.abc import Iterable

from qsvd.adapters.adapter import Adapter
from qsvd.adapters.edora import EDora
from qsvd.adapters.frozen import Frozen
from qsvd.adapters.lora import Lora
from qsvd.adapters.pissa import Pissa

METHODS: dict[str, type[Adapter]] = {
    "pissa": Pissa,
    "lora": Lora,
    "edora": EDora,
}


def default_method(ranks: Iterable[int]) -> str:
    """The method for a base with these stored ranks: pissa, or lora where a weight stores nothing."""
    return "pissa" if all(ranks) else "lora"


def kind_of(method: str, stored_rank: int, ranks: Iterable[int]) -> type[Adapter]:
    """What a weight with this stored rank gets: methods that train stored components leave those without as they are.

    Args:
        ranks: Of all weights. Where none stores any, it is for the method to refuse.
    """
    if stored_rank == 0 and method != "lora" and any(ranks):
        return Frozen
    return METHODS[method]
