"""Compare the gradients of an offloaded model with those of the same model on the device, bit by bit.

Each in turn does one forward and one backward pass with activation checkpoints. Prints one line; the exit code is 1 if
any differs.
"""

import gc
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch.nn.attention import SDPBackend, sdpa_kernel

import qsvd
from qsvd.adapters.model import trained
from qsvd.memory.items import Placement


@dataclass(frozen=True)
class Gate:
    """The quantized model and the tokens of the one sequence."""

    base: tyro.conf.Positional[Path]
    tokens: int = 512
    device: str = "cuda"


def gradients(gate: Gate, placement: Placement) -> dict[str, torch.Tensor]:
    """Return the loss and the gradient of every trained parameter, on the CPU."""
    device = torch.device(gate.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = qsvd.load(gate.base, device=device, dtype=dtype, placement=placement).train()
    model.activation_checkpointing_enable()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, model.config.vocab_size, (1, gate.tokens), generator=generator).to(device)
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels add in an order that differs from run to run
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    found = {name: parameter.grad for name, parameter in trained(model).items()}
    return {"loss": loss.detach().cpu(), **{name: grad.cpu() for name, grad in found.items() if grad is not None}}


def main(gate: Gate) -> int:
    """Print how many gradients are equal; return 1 if one is not, or is missing."""
    resident = gradients(gate, Placement())
    gc.collect()
    offloaded = gradients(gate, Placement(0, "host"))
    wrong = [name for name, tensor in resident.items() if name not in offloaded or not tensor.equal(offloaded[name])]
    print(f"{len(resident) - len(wrong)} of {len(resident)} gradients (and the loss) are equal; wrong: {wrong[:5]}")
    return 1 if wrong or len(resident) < 2 else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Gate, description=__doc__)))
