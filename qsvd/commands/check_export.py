"""Does an export compute what was trained? Load it with the libraries that it is for, and compare logits."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qsvd.adapters.model import split_linears
from qsvd.commands.trained_model import Opened

BATCH, LENGTH = 2, 32  # random tokens
COPIES = 4  # float32 models that are in memory at the same time, at most
FLOOR = 1e-3  # of the spread: float32 sums in another order, on deep models
ROUNDINGS = 8  # an export is rounded in another place than the model that says how much rounding costs


@dataclass(frozen=True)
class Checked:
    """How far an export is from what it should be.

    difference is the largest difference of a logit, spread the standard deviation of all logits, agreement the share
    of positions with the same most probable token (or class) as the trained model has.
    """

    difference: float
    spread: float
    agreement: float

    def line(self, expected: str) -> str:
        """In words."""
        return (
            f"checked: logits differ by at most {self.difference:.2g} from {expected} (their spread is "
            f"{self.spread:.2g}); {self.agreement:.1%} of top tokens as trained"
        )


def fits(opened: Opened) -> bool:
    """Whether a few float32 copies of the model fit in free memory."""
    elements = sum(weight["shape"][0] * weight["shape"][1] for weight in opened.split.weights.values())
    elements += sum(entry.num_bytes // 2 for entry in opened.trained.others().values())
    return COPIES * 4 * elements < _available_bytes()


def _available_bytes() -> int:
    """Of host memory, with what the system gives up for it: the files of an export fill its cache."""
    meminfo = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE) if meminfo.is_file() else None
    return int(found[1]) * 1024 if found else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@torch.no_grad()
def check(opened: Opened, candidate: Any, expected: Any, dtype: torch.dtype) -> Checked:
    """Compare an export, as a library loaded it, with what it should be.

    Raises:
        ValueError: they differ by more than rounding to `dtype` explains.
    """
    vocabulary = expected.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    found, wanted, trained = (_logits(model, tokens) for model in (candidate, expected, opened.load()))
    checked = Checked(
        difference=(found - wanted).abs().max().item(),
        spread=wanted.std().item(),
        agreement=(found.argmax(-1) == trained.argmax(-1)).double().mean().item(),
    )
    limit = FLOOR * checked.spread + ROUNDINGS * (_logits(_rounded(opened, dtype), tokens) - trained).abs().max().item()
    if not checked.difference <= limit:
        raise ValueError(
            f"the export does not compute what was trained: logits differ by {checked.difference:.3g}, their spread is "
            f"{checked.spread:.3g}; please report this"
        )
    return checked


def _rounded(opened: Opened, dtype: torch.dtype) -> Any:
    """The trained model with every parameter rounded to `dtype`: what that alone costs is known without an export."""
    model = plain(opened, opened.trained.dense)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    return model


def plain(opened: Opened, dense: Callable[[str], Tensor]) -> Any:
    """The model with nn.Linear in the place of every SplitLinear.

    Args:
        dense: Weight [O, I] by the name of its tensor in the base.
    """
    model = opened.load()
    for path, linear in list(split_linears(model)):
        with torch.device("meta"):
            made = nn.Linear(linear.in_features, linear.out_features, bias=False)
        made.weight = nn.Parameter(dense(linear.name).float(), requires_grad=False)
        made.register_parameter("bias", linear.bias)
        model.set_submodule(path, made)
    return model


def with_adapter(model: Any, folder: Path) -> Any:
    """PEFT's model."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder)).eval()


def _logits(model: Any, tokens: Tensor) -> Tensor:
    outputs = model(input_ids=tokens)
    return (outputs.logits if "logits" in outputs else outputs.last_hidden_state).float()
