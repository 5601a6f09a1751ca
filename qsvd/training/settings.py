"""The settings of a training run, and the arguments of transformers' and TRL's trainers."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qsvd.memory.training import ROWS
from qsvd.ranks import size

if TYPE_CHECKING:
    from transformers import TrainingArguments
    from trl import SFTConfig

OPTIMIZERS = {  # ours -> transformers'
    "adamw": "adamw_torch",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "paged_adamw_32bit": "paged_adamw_32bit",
    "lora-rite": "adamw_torch",  # replaced by make_trainer
}
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class Settings:
    """How to train.

    Args:
        learning_rate: The peak, reached after `warmup` (a share of all steps); `schedule` lowers it afterwards.
        steps: Optimizer steps, or None for `epochs` passes over the data.
        batch_size: Sequences of one forward pass; a step has `accumulate` such batches, over all processes.
        max_grad_norm: Gradients are scaled down to this norm; 0 switches that off.
        precondition: "riemannian" or "none".
        damping: Of the preconditioner.
        layer_major: Give the model all batches of a step at once; every block divides them into batches again.
        packing: The rows of the data are packed (data/tokens.py).
        gradient_checkpointing: Compute the activations of blocks twice instead of keeping them.
        unrecomputed: Number of blocks, the last ones, that keep them all the same.
        save_every: Steps between checkpoints; the newest `keep` of them are kept. 0 writes none.
        report_to: Trackers of transformers' Trainer: "tensorboard", "wandb", "trackio".
    """

    learning_rate: float
    schedule: str
    warmup: float
    epochs: float
    steps: int | None
    batch_size: int
    accumulate: int
    max_length: int
    packing: bool
    optimizer: str
    precondition: str
    damping: float
    weight_decay: float
    max_grad_norm: float
    gradient_checkpointing: bool
    activation_offload: bool
    layer_major: bool
    save_every: int
    keep: int
    seed: int
    report_to: tuple[str, ...]
    unrecomputed: int = 0


def default_optimizer(device: torch.device) -> str:
    """Return QLoRA's paged 8-bit AdamW for a GPU, torch's AdamW for a CPU."""
    return "paged_adamw_8bit" if device.type == "cuda" else "adamw"


def forget(optimizer: Any, parameters: Iterable[nn.Parameter]) -> None:
    """Let an optimizer begin anew with these parameters: their moments and their counts of steps become 0.

    The tensors stay, since bitsandbytes never frees paged ones. Its tables of 8-bit levels are no state.
    """
    for parameter in parameters:
        if parameter.is_cuda:
            torch.cuda.synchronize()  # paged state is written by the CPU, and kernels may still read it
        state = optimizer.state.get(parameter, {})
        for name, value in state.items():
            if isinstance(value, Tensor) and not name.startswith("qmap"):
                value.zero_()
            elif name == "step":
                state[name] = 0


def language_arguments(settings: Settings, folder: Path, device: torch.device) -> "SFTConfig":
    """Return the arguments of TRL's SFTTrainer, for data that is tokenized, labelled and cut already."""
    from trl import SFTConfig

    arguments = SFTConfig(
        **_common(settings, folder, device),
        max_length=settings.max_length,
        router_aux_loss_coef=0.0,  # routers are frozen
        dataset_kwargs={"skip_prepare_dataset": True},
        activation_offloading=settings.activation_offload,
    )
    return _on_one_gpu(arguments)


def classifier_arguments(settings: Settings, folder: Path, device: torch.device) -> "TrainingArguments":
    """Return the arguments of transformers' Trainer."""
    from transformers import TrainingArguments

    return _on_one_gpu(TrainingArguments(**_common(settings, folder, device)))


def _on_one_gpu(arguments: Any) -> Any:
    """Return the arguments with one GPU, the current one: by default a Trainer copies the model to all GPUs."""
    if arguments.device.type == "cuda":  # asking for the device counts the GPUs
        arguments._n_gpu = 1
    return arguments


def _common(settings: Settings, folder: Path, device: torch.device) -> dict[str, Any]:
    accumulate = settings.accumulate // size()  # batches of a step that this process computes
    batches = accumulate if settings.layer_major else 1  # in one forward pass
    return {
        "output_dir": str(folder),
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": SCHEDULES[settings.schedule],
        "warmup_steps": settings.warmup,  # a share, below 1
        "num_train_epochs": settings.epochs,
        "max_steps": settings.steps or -1,
        "per_device_train_batch_size": settings.batch_size * batches,
        "gradient_accumulation_steps": accumulate // batches,
        "optim": OPTIMIZERS[settings.optimizer],
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "activation_checkpointing": settings.gradient_checkpointing,
        "save_strategy": "steps" if settings.save_every else "no",
        "save_steps": settings.save_every or 1,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "report_to": list(settings.report_to) or "none",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "include_num_input_tokens_seen": "non_padding",
        "disable_tqdm": True,
        "use_cpu": device.type == "cpu",
        "bf16": False,  # the model has its compute dtype already; autocast would only copy activations
        "remove_unused_columns": False,
        "dataloader_pin_memory": device.type == "cuda",
    }


def limit_tiles(device: torch.device) -> None:
    """Let TRL's loss, in this process, make the logits of as many tokens at a time as are planned."""
    from trl.kernels import chunked_logprob

    chunked_logprob.TOKEN_CHUNK_SIZE = ROWS[device.type]
