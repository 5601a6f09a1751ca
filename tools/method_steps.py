"""Training steps of one adapter method, for `tools/bench methods`; as a program, one line of JSON with the peak memory.

A step is what the trainer of qsvd does: forward, backward, the method's hooks, clipping, AdamW.
"""

import json
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import qsvd
from qsvd.adapters.methods.hooks import Course
from qsvd.adapters.methods.table import METHODS
from qsvd.adapters.model import split_linears, trained
from qsvd.console.progress import quiet
from qsvd.training.steps import peak_bytes_of

COURSE = Course(steps=1000, learning_rate=1e-6)  # long, so that adalora removes nothing yet, and slow: nothing diverges


@dataclass(frozen=True)
class Racer:
    """A method, the quantized model and the batch."""

    method: str
    base: Path
    rank: int
    tokens: int
    batch: int = 1
    checkpointing: bool = True
    device: str = "cpu"
    steps: int = 2


class Steps:
    """A model with adapters of one method, and its optimizer."""

    def __init__(self, racer: Racer):
        kind, device = METHODS[racer.method], torch.device(racer.device)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        options = qsvd.AdapterOptions(racer.method, rank=racer.rank, dtype="float32")
        self.model = qsvd.load(racer.base, options=options, device=device, dtype=dtype).train()
        if racer.checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.config.use_cache = False
        self.parameters = [*trained(self.model).values()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=COURSE.learning_rate, weight_decay=0)
        adapters = {path: linear.adapter for path, linear in split_linears(self.model)}
        self.hooks = kind.hooks({path: a for path, a in adapters.items() if isinstance(a, kind)}, COURSE)
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.model.config.vocab_size
        self.tokens = torch.randint(vocabulary, (racer.batch, racer.tokens), generator=generator).to(device)
        self.done = 0

    def step(self) -> float:
        """Train one step; return its seconds: of this process on a CPU, since other work may run beside it."""
        started = self._now()
        self.done += 1
        self.model(input_ids=self.tokens, labels=self.tokens).loss.backward()
        self.hooks.after_backward(self.done)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.hooks.transform_grads(self.done)
        self.optimizer.step()
        self.hooks.after_step(self.done)
        self.optimizer.zero_grad()
        return self._now() - started

    def _now(self) -> float:
        if self.tokens.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


def main(racer: Racer) -> None:
    """Train a few steps and print the peak, and on a CPU the memory of the process before the model."""
    device = torch.device(racer.device)
    before = peak_bytes_of(device)()
    peak = peak_bytes_of(device)
    steps = Steps(racer)
    for _ in range(racer.steps):
        steps.step()
    print(json.dumps({"peak": peak(), "before": before if device.type == "cpu" else 0}))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with quiet():
        main(tyro.cli(Racer))
    sys.stdout.flush()
