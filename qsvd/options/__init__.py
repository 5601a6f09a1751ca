"""The options of the fourteen commands: each one's flag, default, help text, range and group, written once.

qsvd/option_types.py says what the marks mean. The first line of a docstring is shown by `qsvd --help`.
"""

from qsvd.options.comparing import Compare as Compare
from qsvd.options.quantizing import Allocate as Allocate
from qsvd.options.quantizing import Calibrate as Calibrate
from qsvd.options.quantizing import Prune as Prune
from qsvd.options.quantizing import Quantize as Quantize
from qsvd.options.training import Plan as Plan
from qsvd.options.training import Train as Train
from qsvd.options.training import TrainingOptions as TrainingOptions
from qsvd.options.using import Aggregate as Aggregate
from qsvd.options.using import Demo as Demo
from qsvd.options.using import Eval as Eval
from qsvd.options.using import Export as Export
from qsvd.options.using import Generate as Generate
from qsvd.options.using import Methods as Methods
from qsvd.options.using import Report as Report
from qsvd.options.using import Verify as Verify
