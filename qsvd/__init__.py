"""qsvd: split 16-bit checkpoints into high-precision principal components and a 4-bit residual.

    import qsvd
    qsvd.quantize(qsvd.Quantize("path/or/hub-id", out=Path("OUT"), rank=64))  # a whole checkpoint, as the command does
    model = qsvd.load("OUT")                            # a transformers model with the result inside, to train
    model = qsvd.load("OUT", adapter="RUN")             # with what `qsvd train` made of it
    qsvd.split_weight(weight, qsvd.Recipe(qsvd.NormalFloat4(double_quant=True), rank=64))  # one matrix
    qsvd.split_weight(weight, qsvd.Recipe(qsvd.NormalFloat(bits=3, block_size=32), rank=16))  # in 2, 3, 4 or 8 bits

After `import qsvd`, transformers' own from_pretrained opens a result of mixed bits too. To say so takes transformers
and its seconds; qsvd's own command line registers only where it loads a model. The names above are imported when they
are first used.
"""

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qsvd.adapters.adapter import AdapterOptions
    from qsvd.adapters.load import load
    from qsvd.commands.quantize import quantize
    from qsvd.decompose.alternate import Recipe, split_weight
    from qsvd.decompose.split import Split, measure
    from qsvd.memory.items import Placement
    from qsvd.numerics.nf4 import NormalFloat4
    from qsvd.numerics.normal_float import Nesting, NormalFloat
    from qsvd.options import Quantize

__version__ = "0.1.0"

__all__ = [
    "AdapterOptions",
    "Nesting",
    "NormalFloat",
    "NormalFloat4",
    "Placement",
    "Quantize",
    "Recipe",
    "Split",
    "load",
    "measure",
    "quantize",
    "split_weight",
]

_HOMES = {
    "load": "qsvd.adapters.load",
    "Placement": "qsvd.memory.items",
    "AdapterOptions": "qsvd.adapters.adapter",
    "quantize": "qsvd.commands.quantize",
    "Quantize": "qsvd.options",
    "split_weight": "qsvd.decompose.alternate",
    "Recipe": "qsvd.decompose.alternate",
    "Split": "qsvd.decompose.split",
    "measure": "qsvd.decompose.split",
    "NormalFloat4": "qsvd.numerics.nf4",
    "NormalFloat": "qsvd.numerics.normal_float",
    "Nesting": "qsvd.numerics.normal_float",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qsvd' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def _is_own_command_line() -> bool:
    """Whether this process is `qsvd` or `python -m qsvd`, whose argv[0] is "-m" while the package is imported."""
    program = "".join(sys.argv[:1])
    if program != "-m":
        return Path(program).name == "qsvd"
    words = "".join(f" {word}" for word in sys.orig_argv)  # the module follows -m, perhaps without a space
    return re.search(r" -\w*m ?qsvd(\s|$)", words) is not None


if not _is_own_command_line():
    import_module("qsvd.adapters.quantizer").register()
