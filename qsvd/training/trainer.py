"""TRL's SFTTrainer and transformers' Trainer with adapter-only checkpoints, the method's hooks, and guards."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
)
from trl import SFTTrainer

from qsvd.adapters.adapter import Adapter
from qsvd.adapters.methods.hooks import Course, Hooks
from qsvd.adapters.methods.pissa import Pissa
from qsvd.adapters.methods.table import METHODS
from qsvd.adapters.model import is_sharded, restore, split_linears, trained_pairs
from qsvd.adapters.start import read_components
from qsvd.data.columns import UNTRAINED
from qsvd.data.media import MediaRows
from qsvd.data.tokens import count_packed, packed_batch
from qsvd.errors import BadInput
from qsvd.files.adapter import open_adapter
from qsvd.files.safetensors import new_tensors, read_header, read_tensor, write_stream
from qsvd.files.split_folder import SplitFolder
from qsvd.ranks import from_main, is_main, size
from qsvd.training.checkpoints import UNFINISHED, checkpoints, finish, step_of, written_whole
from qsvd.training.guards import check_apart, check_start, not_finite
from qsvd.training.lora_rite import LoraRite
from qsvd.training.settings import Settings, classifier_arguments, language_arguments, limit_tiles
from qsvd.training.steps import CallMethod, SetRate
from qsvd.training.together import DividedTraining, is_blank, share_sums, share_values, unseen
from qsvd.training.updates import Riemannian, Rounding

HOOKS = "hooks.safetensors"  # of a checkpoint: the state of the method's hooks


class SplitTraining(DividedTraining):
    """The part that both trainers share.

    Attributes:
        method: The method of the adapters.
        hooks: Are called in every optimizer step.
        preconditioner: Changes the gradients after the hooks, right before the optimizer; None changes nothing.
        rounding: Rounds the steps of bfloat16 parameters.
        base: The quantized model, whose stored components give the loss that the first one is compared with; None
            leaves the comparison out.
        keep: How many checkpoints are kept.
        best: Returns the step whose checkpoint is kept too, or None.
        held_out: Returns the loss on the held-out examples.
        eval_every: Steps between two of these measurements; None measures none.
    """

    model: Any
    method: type[Adapter]
    hooks: Hooks
    preconditioner: Riemannian | None = None
    rounding: Rounding
    resumed_from: Path | None = None
    base: SplitFolder | None
    keep: int
    is_classifier: bool
    best: Callable[[], int | None]
    held_out: Callable[[], float | None]
    eval_every: int | None = None
    is_checked = False

    @property
    def run(self) -> Path:
        """The folder of the checkpoints."""
        assert self.args.output_dir, "given by make_trainer"
        return Path(self.args.output_dir)

    @abstractmethod
    def start_loss(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the mean loss of a batch in nats."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run one batch forward and backward; stop if the first loss is too high or a loss is not finite."""
        # Before the first step only: a resumed run starts at a later one, and has been checked.
        if self.state.global_step == 0 and not self.is_checked and self.measures:
            self.check_first(self._prepare_inputs(inputs))
            self.is_checked = True  # the first step can have several batches; the first one is enough
        self.begin_batch()
        if is_blank(inputs):
            with unseen(self.model):
                loss = self.blank_step(model, inputs, num_items_in_batch)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._check_finite("loss", loss.item())
        # True at the last batch of a step, when the gradients of all its batches are summed.
        if self.accelerator.sync_gradients:
            self.end_step()
            share_sums(self.hooks.looked())
            self.hooks.after_backward(self.state.global_step + 1)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the held-out loss to what is logged for a step, so that files and trackers get both."""
        step, last = self.state.global_step, self.state.max_steps
        if "grad_norm" in logs and self.eval_every and (step % self.eval_every == 0 or step == last):
            loss = self.held_out() if self.is_sharded else from_main(self.held_out)
            assert loss is not None, "prepare_train refuses --eval-every without held-out examples"
            logs["eval_loss"] = loss
        super().log(logs, *args, **kwargs)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Check the norm before the optimizer step, which would make every parameter NaN."""
        norm: Any = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._check_finite("gradient norm", float(norm))
        return norm

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save only the adapter: the quantized model does not change."""
        del state_dict
        self.model.save_pretrained(output_dir or self.run)

    def start_hooks(self, course: Course) -> None:
        """Make the hooks of the run, or continue those of the checkpoint."""
        adapters = ((path, linear.adapter) for path, linear in split_linears(self.model))
        trained = {path: adapter for path, adapter in adapters if isinstance(adapter, self.method)}
        share_values([p for p in self.model.parameters() if p.requires_grad])
        self.hooks = self.method.hooks(trained, course)
        if size() > 1 and any(adapter.looks for adapter in trained.values()) and not self.hooks.looked():
            raise BadInput(
                "the method looks at the inputs of its layers with these options, which processes do not share yet: "
                "train in one process"
            )
        if self.resumed_from is not None and self.hooks.state():
            path = self.resumed_from / HOOKS
            if not path.is_file():
                raise BadInput(
                    f"{path}, the state of the method, is missing: remove that folder to go on from the one before"
                )
            self.hooks.restore({name: read_tensor(entry) for name, entry in read_header(path).tensors.items()})

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimizer; parameters with a rate of their own get groups of their own."""
        is_made = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        rates = {
            id(linear.adapter.get_parameter(name)): rate
            for _, linear in split_linears(self.model)
            for name, rate in linear.adapter.rates().items()
        }
        for group in () if is_made else list(optimizer.param_groups):
            for rate in sorted({rates[id(p)] for p in group["params"] if id(p) in rates}):
                own = [p for p in group["params"] if rates.get(id(p)) == rate]
                group["params"] = [p for p in group["params"] if rates.get(id(p)) != rate]
                optimizer.add_param_group({**group, "params": own, "lr": rate * group["lr"]})
        return optimizer

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if not is_main():
            self.store_flos()  # the first process waits for it
            return
        with written_whole(self.run, self.state.global_step) as place:
            super()._save_checkpoint(model, trial)  # into RUN/unfinished, see _get_output_dir
        if state := self.hooks.state():
            write_stream(place / HOOKS, new_tensors(state), {"format": "pt"})
        # Renamed when it is complete, so that a run that is killed here resumes from the checkpoint before it.
        finish(self.run, self.state.global_step, keep=self.keep, best=self.best(), every=self.args.save_steps)

    def _get_output_dir(self, trial: Any) -> str:
        del trial
        return str(self.run / UNFINISHED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.resumed_from = Path(resume_from_checkpoint)
        restore(model or self.model, open_adapter(self.resumed_from))

    def create_model_card(self, *_: object, **__: object) -> None:
        """Write nothing: the run has its own README."""

    def _run_epoch(self, *epoch: Any, **named: Any) -> None:
        """Train one epoch, unless the last step is done: transformers would make one more before it checks."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*epoch, **named)

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            saved = checkpoints(self.run)
            raise not_finite(what, value, self.state.global_step + 1, step_of(saved[-1]) if saved else None)

    def check_first(self, inputs: dict[str, Any]) -> None:
        """Compare the loss of the first batch with that of guessing and of the quantized model, if that is there."""
        if self.base is None:
            return
        self.model.eval()  # without dropout; training_step switches back to train()
        with torch.no_grad():
            loss = self.start_loss(inputs).item()
            with stored_components(self.model, self.base):
                base_loss = self.start_loss(inputs).item()
        if is_blank(inputs):
            return  # the passes were for the other processes
        config = self.model.config
        choices = config.num_labels if self.is_classifier else config.get_text_config().vocab_size
        check_start(loss, base_loss, choices, is_classifier=self.is_classifier)


class LanguageTrainer(SplitTraining, SFTTrainer):
    """The trainer of causal language models, maybe on packed rows; its loss never holds all logits."""

    is_classifier = False
    is_packed = False

    def check_first(self, inputs: dict[str, Any]) -> None:
        if self.is_packed:
            check_apart(self.model, inputs)
        super().check_first(inputs)

    def _track_num_input_tokens(self, inputs: dict[str, Tensor]) -> None:
        if self.is_packed:
            self.add_tokens(0 if is_blank(inputs) else count_packed(inputs["position_ids"]))
        else:
            super()._track_num_input_tokens(inputs)

    def blank_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        return super(SplitTraining, self).training_step(model, inputs, num_items_in_batch)  # TRL gathers its metrics

    def start_loss(self, inputs: dict[str, Tensor]) -> Tensor:
        outputs = self.model(**inputs, use_cache=False, fused_lm_head=True)
        return -outputs.log_probs.sum() / outputs.label_mask.sum()


class ClassifierTrainer(SplitTraining, Trainer):
    """The trainer of sequence classifiers."""

    is_classifier = True

    def compute_loss(self, *inputs: Any, **named: Any) -> Any:
        """Return the mean loss of this batch, so that the mean over processes is that over the batches of the step."""
        loss: Any = super().compute_loss(*inputs, **named)
        return loss if size() == 1 else loss * self.share

    def start_loss(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.model(**inputs).loss


class EncoderDecoderTrainer(SplitTraining, Trainer):
    """The trainer of models whose decoder writes what it learns from what its encoder reads or hears."""

    is_classifier = False

    def _track_num_input_tokens(self, inputs: dict[str, Tensor]) -> None:
        """Count the tokens that are read; of sounds, those that are written."""
        if "input_ids" in inputs:
            super()._track_num_input_tokens(inputs)
        else:
            self.add_tokens(int((inputs["labels"] != UNTRAINED).sum()))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of this batch as its share of the mean over all trained tokens of a step."""
        outputs = model(**inputs)
        share = (inputs["labels"] != UNTRAINED).sum() / num_items_in_batch * size()  # the mean over processes is next
        return (outputs.loss * share, outputs) if return_outputs else outputs.loss * share

    def start_loss(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.model(**inputs).loss


def make_trainer(
    model: Any, tokenizer: Any, data: Any, settings: Settings, run: Path, base: SplitFolder | None = None
) -> LanguageTrainer | ClassifierTrainer | EncoderDecoderTrainer:
    """Return a trainer for a model from `qsvd.load`.

    Args:
        data: A datasets.Dataset with the columns input_ids and labels, packed rows, or MediaRows.
        run: Folder of the checkpoints.
        base: The quantized model, to compare the first loss with that of its stored components; None does not.
    """
    is_classifier = bool(model.split_record.labels)
    model.micro_batch = settings.batch_size if settings.layer_major else None
    model.unrecomputed = settings.unrecomputed
    if is_classifier or model.config.is_encoder_decoder:
        arguments = classifier_arguments(settings, run, model.device)
        kind = ClassifierTrainer if is_classifier else EncoderDecoderTrainer
        collator = DataCollatorWithPadding(tokenizer) if is_classifier else DataCollatorForSeq2Seq(tokenizer, model)
        if isinstance(data, MediaRows):
            collator, data = partial(_batch_in, model.dtype, data), data.as_dataset()
        trainer = kind(model, arguments, data_collator=collator, train_dataset=data)
        # A classifier's loss is the mean of its batch: the trainer must divide by the number of batches of a step.
        trainer.model_accepts_loss_kwargs = not is_classifier
    else:
        arguments = language_arguments(settings, run, model.device)
        chosen = {"processing_class": tokenizer, "train_dataset": data}
        if isinstance(data, MediaRows):
            chosen = {"processing_class": data.processor, "train_dataset": data.as_dataset()}
            chosen["data_collator"] = data.batch_of
        elif settings.packing:
            chosen["data_collator"] = partial(packed_batch, padding=tokenizer.pad_token_id)
        limit_tiles(model.device)
        trainer = LanguageTrainer(model, arguments, **chosen)
        trainer.is_packed = settings.packing
    trainer.method, trainer.base, trainer.keep = METHODS[model.split_record.method], base, settings.keep
    trainer.best = lambda: None
    trainer.is_sharded = is_sharded(model)
    if size() > 1:
        model._is_accelerate_prepared = True  # else accelerate wraps it, see together.py
    trainer.rounding = Rounding(settings.seed, model.device)
    pairs = trained_pairs(model)
    if settings.optimizer == "lora-rite":
        trainer.optimizer_cls_and_kwargs = (LoraRite, {"pairs": pairs, "lr": settings.learning_rate})
    if settings.precondition == "riemannian":
        trainer.preconditioner = Riemannian(pairs, settings.damping)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(CallMethod(trainer))
    trainer.add_callback(SetRate())
    return trainer


def _batch_in(dtype: torch.dtype, data: MediaRows, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return the tensors of some rows of sounds, in the dtype of the model, which does not cast them."""
    batch = data.batch_of(rows)
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}


@contextmanager
def stored_components(model: nn.Module, split: SplitFolder) -> Iterator[None]:
    """Give the model the stored components instead of its adapters inside a `with` block; they are read again."""
    modules = [module for _, module in split_linears(model)]
    adapters = [module.adapter for module in modules]
    try:
        for module in modules:
            up_OR, down_RI = read_components(split, module.name)
            # A frozen adapter has buffers only.
            device = next(chain(module.adapter.parameters(), module.adapter.buffers())).device
            module.adapter = Pissa(up_OR.to(device), down_RI.to(device)).requires_grad_(False)
        yield
    finally:
        for module, adapter in zip(modules, adapters, strict=True):
            module.adapter = adapter
