"""One frozen dataclass for each command: its flags, their defaults and help, and the record that is saved."""

from qsvd.options.allocate import Allocate
from qsvd.options.calibrate import Calibrate
from qsvd.options.demo import Demo
from qsvd.options.evaluate import Eval
from qsvd.options.export import Export
from qsvd.options.plan import Plan
from qsvd.options.quantize import Quantize, Report
from qsvd.options.train import Train

__all__ = ["Allocate", "Calibrate", "Demo", "Eval", "Export", "Plan", "Quantize", "Report", "Train"]
