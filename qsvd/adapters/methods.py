"""The methods by name: one line each."""

from qsvd.adapters.adapter import Adapter
from qsvd.adapters.edora import EDora
from qsvd.adapters.lora import Lora
from qsvd.adapters.pissa import Pissa

METHODS: dict[str, type[Adapter]] = {
    "pissa": Pissa,
    "lora": Lora,
    "edora": EDora,
}
