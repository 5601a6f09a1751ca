"""qsvd: quantize 16-bit models and keep the largest singular components of each weight in 16 bits.

    import qsvd
    qsvd.quantize("path/or/hub-id", out="OUT", rank=64)  # as the command does; also plan, train, evaluate, ...
    model = qsvd.load("OUT")                            # a transformers model with a new adapter, to train
    model = qsvd.load("OUT", adapter="RUN")             # with the adapter that `qsvd train` wrote
    qsvd.generate("RUN", "Who are you?")                # the answer of a 16-bit model, a quantized model or a run
    qsvd.split_weight(weight, qsvd.Recipe(qsvd.NormalFloat4(double_quant=True), rank=64))  # one matrix
    qsvd.split_weight(weight, qsvd.Recipe(qsvd.NormalFloat(bits=3, block_size=32), rank=16))  # in 2, 3, 4 or 8 bits

After `import qsvd`, transformers' from_pretrained also opens a quantized model of mixed bits (see qsvd.hf). Each name
is imported when it is first used, so that `import qsvd` loads neither torch nor transformers.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names as in _HOMES, for type checkers and editors
    from qsvd.adapters.adapter import AdapterOptions as AdapterOptions
    from qsvd.adapters.load import load as load
    from qsvd.api import aggregate as aggregate
    from qsvd.api import allocate as allocate
    from qsvd.api import calibrate as calibrate
    from qsvd.api import compare as compare
    from qsvd.api import evaluate as evaluate
    from qsvd.api import export as export
    from qsvd.api import plan as plan
    from qsvd.api import prune as prune
    from qsvd.api import quantize as quantize
    from qsvd.api import train as train
    from qsvd.commands.generate import generate as generate
    from qsvd.decompose.alternate import Recipe as Recipe
    from qsvd.decompose.alternate import split_weight as split_weight
    from qsvd.decompose.split import Split as Split
    from qsvd.decompose.split import measure as measure
    from qsvd.errors import BadInput as BadInput
    from qsvd.errors import DoesNotFit as DoesNotFit
    from qsvd.memory.items import Placement as Placement
    from qsvd.numerics.int4 import Int4 as Int4
    from qsvd.numerics.nf4 import NormalFloat4 as NormalFloat4
    from qsvd.numerics.normal_float import Nesting as Nesting
    from qsvd.numerics.normal_float import NormalFloat as NormalFloat
    from qsvd.options import Quantize as Quantize

__version__ = "0.1.0"

_HOMES = {
    "load": "qsvd.adapters.load",
    "Placement": "qsvd.memory.items",
    "AdapterOptions": "qsvd.adapters.adapter",
    "generate": "qsvd.commands.generate",
    "plan": "qsvd.api",
    "quantize": "qsvd.api",
    "calibrate": "qsvd.api",
    "allocate": "qsvd.api",
    "prune": "qsvd.api",
    "train": "qsvd.api",
    "aggregate": "qsvd.api",
    "evaluate": "qsvd.api",
    "compare": "qsvd.api",
    "export": "qsvd.api",
    "BadInput": "qsvd.errors",
    "DoesNotFit": "qsvd.errors",
    "Quantize": "qsvd.options",
    "split_weight": "qsvd.decompose.alternate",
    "Recipe": "qsvd.decompose.alternate",
    "Split": "qsvd.decompose.split",
    "measure": "qsvd.decompose.split",
    "Int4": "qsvd.numerics.int4",
    "NormalFloat4": "qsvd.numerics.nf4",
    "NormalFloat": "qsvd.numerics.normal_float",
    "Nesting": "qsvd.numerics.normal_float",
}
__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


class _Package(ModuleType):
    """qsvd.plan, calibrate, evaluate, export, prune are functions, and folders with code; Python sets the folders."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _HOMES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
import_module("qsvd.hf")  # registers with transformers; if that is loaded, it imports qsvd.plan, so not before this


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qsvd' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
