"""Train a few steps with one library, for `tools/bench train`, and print one line of JSON.

qsvd is `qsvd.load` with LoRA and qsvd's trainer. peft is transformers' Linear4bit on the same NF4 codes with PEFT's
LoRA and TRL's SFTTrainer, as QLoRA is usually run. Rank, tokens, batches, optimizer and loss are the same.
"""

import json
import random
import statistics
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTTrainer

import qsvd
from qsvd.commands.demo import MODEL
from qsvd.console.progress import quiet
from qsvd.training.settings import Settings, default_optimizer, language_arguments
from qsvd.training.steps import peak_bytes_of
from qsvd.training.trainer import make_trainer

WARM_UP = 2  # steps that are not measured
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Contest:
    """The library, the quantized model and the run."""

    who: Literal["qsvd", "peft"]
    base: Path
    run: Path
    length: int = 512
    batch: int = 1
    steps: int = 8
    rank: int = 16
    checkpointing: bool = True
    device: str = "cpu"


class Stopwatch(TrainerCallback):
    """Callback that measures the seconds of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock; the batch is ready."""
        self.started = now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop the clock; the parameters are updated."""
        self.seconds.append(now() - self.started)


def now() -> float:
    """Return the time in seconds, after the work of the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main(contest: Contest) -> None:
    """Train and print speed, memory and the first loss."""
    device = torch.device(contest.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    before = peak_bytes_of(device)()
    peak = peak_bytes_of(device)
    settings = Settings(
        learning_rate=1e-4,
        schedule="constant",
        warmup=0.0,
        epochs=1,
        steps=contest.steps,
        batch_size=contest.batch,
        accumulate=1,
        max_length=contest.length,
        packing=False,
        optimizer=default_optimizer(device),
        precondition="none",
        damping=1e-6,
        weight_decay=0.0,
        max_grad_norm=1.0,
        gradient_checkpointing=contest.checkpointing,
        activation_offload=False,
        layer_major=False,
        save_every=10**6,
        keep=1,
        seed=0,
        report_to=(),
    )
    tokenizer, data = AutoTokenizer.from_pretrained(MODEL), random_tokens(contest)
    if contest.who == "qsvd":
        options = qsvd.AdapterOptions(
            "lora", rank=contest.rank, alpha=contest.rank, dtype="bfloat16"
        )  # as TRL casts PEFT's
        model = qsvd.load(contest.base, options=options, device=device, dtype=dtype)
        trainer: Any = make_trainer(model, tokenizer, data, settings, contest.run)
    else:
        model = AutoModelForCausalLM.from_pretrained(contest.base, dtype=dtype, device_map={"": contest.device})
        config = LoraConfig(
            r=contest.rank, lora_alpha=contest.rank, target_modules=LINEARS, task_type="CAUSAL_LM", lora_dropout=0.0
        )
        trainer = SFTTrainer(
            model,
            language_arguments(settings, contest.run, device),
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=config,
        )
        trainer.args.save_strategy = "no"
    stopwatch = Stopwatch()
    trainer.add_callback(stopwatch)
    trainer.args.save_strategy = "no"
    trainer.train()
    seconds = statistics.median(stopwatch.seconds[WARM_UP:])
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(
        json.dumps(
            {
                "tokens_per_second": contest.batch * contest.length / seconds,
                "peak": peak(),
                "before": before if device.type == "cpu" else 0,
                "trained": trained,
                "first_loss": losses[0],
            }
        )
    )


def random_tokens(contest: Contest) -> Dataset:
    """Return enough random sequences of one length; they take the time that text takes."""
    generator = random.Random(0)
    rows = [generator.choices(range(4, 4096), k=contest.length) for _ in range(contest.batch * (contest.steps + 1))]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with quiet():
        main(tyro.cli(Contest))
    sys.stdout.flush()
