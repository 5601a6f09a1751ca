"""Where a method may act during training, beyond its factors: AdaLoRA's budget, Riemannian gradients."""

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Hooks:
    """What a method does in every optimizer step; the base class does nothing. `step` counts from 1.

    Every hook runs once a step, when the gradients of all its batches are summed.
    """

    def after_backward(self, step: int) -> None:
        """Gradients are whole and not yet clipped."""

    def transform_grads(self, step: int) -> None:
        """Gradients are clipped; the optimizer comes next."""

    def after_step(self, step: int) -> None:
        """The parameters have moved; the gradients are still there."""


class CallHooks(TrainerCallback):
    """Calls the two hooks that transformers' Trainer has a place for."""

    def __init__(self, hooks: Hooks):
        self.hooks = hooks

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        del args, control, kwargs
        self.hooks.transform_grads(state.global_step + 1)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        del args, control, kwargs
        self.hooks.after_step(state.global_step + 1)
