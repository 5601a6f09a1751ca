"""The logits of an export, as the library that it is for computes them, against those of the trained model."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qsvd.adapters.model import split_linears
from qsvd.adapters.tables import unpack_tables
from qsvd.errors import BadInput
from qsvd.plan.language import example_inputs
from qsvd.prepare.models import Opened
from qsvd.report.results import Checked

BATCH, LENGTH = 2, 32  # of the random tokens
COPIES = 4  # float32 models that are in memory at the same time, at most
FLOOR = 1e-3  # of the spread: float32 sums in another order, in deep models
ROUNDINGS = 8  # an export is rounded at other places than the model that measures the effect of rounding


def fits(opened: Opened, others: int = 0) -> bool:
    """Return whether a few float32 copies of the model, and of others with so many numbers, fit in free memory."""
    elements = sum(
        weight["shape"][0] * weight["shape"][1] for weight in (opened.split.weights | opened.split.tables).values()
    )
    elements += others + sum(entry.num_bytes // 2 for entry in opened.trained.others().values())
    return COPIES * 4 * elements < _available_bytes()


def _available_bytes() -> int:
    """Return the free CPU memory, file cache included: the files of an export fill the cache."""
    meminfo = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE) if meminfo.is_file() else None
    return int(found[1]) * 1024 if found else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@torch.no_grad()
def check(opened: Opened, candidate: Any, expected: Any, dtype: torch.dtype) -> Checked:
    """Compare the logits of an export, as a library loaded it, with the expected ones.

    Raises:
        BadInput: they differ by more than rounding to `dtype` explains.
    """
    inputs = example_inputs(expected, BATCH, LENGTH)
    found, wanted, trained = (_logits(model, inputs) for model in (candidate, expected, opened.load()))
    checked = Checked(
        difference=(found - wanted).abs().max().item(),
        spread=wanted.std().item(),
        agreement=(found.argmax(-1) == trained.argmax(-1)).double().mean().item(),
    )
    limit = FLOOR * checked.spread + ROUNDINGS * (_logits(_rounded(opened, dtype), inputs) - trained).abs().max().item()
    if not checked.difference <= limit:
        raise BadInput(
            f"the export does not compute what was trained: logits differ by {checked.difference:.3g}, their spread is "
            f"{checked.spread:.3g}; please report this"
        )
    return checked


def _rounded(opened: Opened, dtype: torch.dtype) -> Any:
    """Return the trained model with every parameter rounded to `dtype`, to measure the effect of rounding alone."""
    model = plain(opened, opened.trained.dense)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    return model


def plain(opened: Opened, dense: Callable[[str], Tensor]) -> Any:
    """Return the model with nn.Linear in the place of every SplitLinear, and embedding and head in float32.

    Args:
        dense: Returns a weight [O, I] by the name of its tensor in the quantized model.
    """
    model = opened.load()
    for path, linear in list(split_linears(model)):
        with torch.device("meta"):
            made = nn.Linear(linear.in_features, linear.out_features, bias=False)
        made.weight = nn.Parameter(dense(linear.name).float(), requires_grad=False)
        made.register_parameter("bias", linear.bias)
        model.set_submodule(path, made)
    unpack_tables(model, torch.float32)
    del model.split_record  # it has no SplitLinear now, and PEFT may add its layers
    return model


def with_adapter(model: Any, folder: Path) -> Any:
    """Return the model with a PEFT adapter."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder)).eval()


def _logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the first output: logits, or the hidden state of a model without a head."""
    outputs = model(**inputs)
    return next(value for value in outputs.to_tuple() if isinstance(value, Tensor)).float()
