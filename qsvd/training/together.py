"""What the processes of a training run share: the batches of a step, the gradients, and when to stop.

Each process has the whole model, or with --shard a part of each block, and computes every N-th batch. Before the
method's hooks and the optimizer see the gradients, they are the same in all processes: the mean of what each has
computed of N times its part of the loss, which is the gradient that one process computes of all batches. No adapter is
wrapped, since hooks replace parameters, experts may have no tokens, and blocks may run in parts; adapters are small, so
that nothing is gained by sending gradients before the last one is there.

Where the last step of an epoch has too few batches for all, some processes get a blank one: a row without trained
tokens, which counts for nothing.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from accelerate.state import PartialState
from torch import Tensor, distributed, nn
from torch.utils.data import BatchSampler
from transformers import Trainer

from qsvd.adapters.model import split_linears
from qsvd.data.columns import UNTRAINED
from qsvd.ranks import is_main, rank, size

BUCKET = 2**25  # elements of gradients that are sent at once


class SharedBatches(BatchSampler):
    """The batches of one process: every N-th of all, and as many as every other process has.

    Args:
        whole: All batches, as lists of row numbers. A blank one is an empty list.
    """

    def __init__(self, whole: BatchSampler):
        self.batch_sampler, self.sampler, self.batch_size = whole, whole.sampler, whole.batch_size
        self.drop_last = False

    def __len__(self) -> int:
        return -(-len(self.batch_sampler) // size())

    def __iter__(self) -> Iterator[list[int]]:
        count = 0
        for number, batch in enumerate(self.batch_sampler):
            if number % size() == rank():
                count += 1
                yield batch
        if count < len(self):
            yield []


def collated(collate: Callable[[list[Any]], dict[str, Tensor]], data: Any, rows: list[Any]) -> dict[str, Tensor]:
    """Return the tensors of some rows; of none, those of the first row of the data without a trained token."""
    if rows:
        return collate(rows)
    batch = collate([data[0]])
    return {**batch, "labels": torch.full_like(batch["labels"], UNTRAINED)}


def is_blank(inputs: dict[str, Any]) -> bool:
    """Return whether a batch trains nothing in a run of several processes."""
    return size() > 1 and bool((inputs["labels"] == UNTRAINED).all())


@contextmanager
def unseen(model: nn.Module) -> Iterator[None]:
    """Let no adapter look at its inputs inside a `with` block."""
    adapters = [linear.adapter for _, linear in split_linears(model) if linear.adapter.looks]
    for adapter in adapters:
        adapter.looks = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.looks = True


def over_all(values: Sequence[int], device: torch.device, *, greatest: bool = False) -> list[int]:
    """Return the sums over all processes, or the greatest ones, of some whole numbers."""
    if size() == 1:
        return list(values)
    sent = torch.tensor(values, dtype=torch.int64, device=device)
    distributed.all_reduce(sent, distributed.ReduceOp.MAX if greatest else distributed.ReduceOp.SUM)
    return sent.tolist()


def is_lost(error: RuntimeError) -> bool:
    """Return whether an error says that another process is gone."""
    return size() > 1 and (isinstance(error, distributed.DistError) or "gloo" in str(error))


@torch.no_grad()
def share_values(parameters: Sequence[Tensor]) -> None:
    """Give all processes the values of the first one."""
    for parameter in parameters if size() > 1 else ():
        distributed.broadcast(parameter.detach(), 0)


@torch.no_grad()
def share_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace the gradients by their means over the processes; one that no process has stays None."""
    if size() == 1 or not parameters:
        return
    there = over_all([p.grad is not None for p in parameters], parameters[0].device, greatest=True)
    found = [parameter for parameter, is_there in zip(parameters, there, strict=True) if is_there]
    for parameter in found:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in found if parameter.grad is not None]
    for bucket in _buckets(gradients):
        share_sums(bucket)
        for gradient in bucket:
            gradient /= size()


@torch.no_grad()
def share_sums(tensors: Sequence[Tensor]) -> None:
    """Replace tensors of one dtype by their sums over the processes, all in one message."""
    if size() == 1 or not tensors:
        return
    sent = torch.cat([tensor.reshape(-1) for tensor in tensors])
    distributed.all_reduce(sent)
    for tensor, part in zip(tensors, sent.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield neighbours of one dtype, up to BUCKET elements of them."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        elements = sum(one.numel() for one in bucket)
        if bucket and (tensor.dtype != bucket[0].dtype or elements + tensor.numel() > BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def join_group(device: torch.device) -> None:
    """Let torch know the other processes, before a model is loaded that they hold together."""
    PartialState(cpu=device.type == "cpu")


class DividedTraining(Trainer):
    """The part of the trainers that several processes need; it changes nothing for one process.

    Attributes:
        share: What a mean over the batches of this process counts in the mean over those of the step.
        is_sharded: Whether the processes hold the model together: all of them make each pass through it.
    """

    share = 1.0
    is_sharded = False
    _at = 0  # the number of the next batch of this process in its step

    def get_train_dataloader(self) -> Any:
        """Return the batches of this process, where accelerate would repeat rows until all have the same number."""
        loader: Any = super().get_train_dataloader()
        if size() == 1:
            return loader
        return DataLoaderShard(
            loader.dataset,
            device=loader.device,
            batch_sampler=SharedBatches(loader.batch_sampler.batch_sampler),
            collate_fn=partial(collated, loader.collate_fn, loader.dataset),
            pin_memory=loader.pin_memory,
        )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if size() > 1:
            (real,) = over_all([sum(not is_blank(inputs) for inputs in samples)], device)
            self.share = size() * len(samples) / real
        return samples, items

    @property
    def measures(self) -> bool:
        """Whether this process makes the passes that are not divided."""
        return is_main() or self.is_sharded

    def blank_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        """Do for a blank batch what other processes wait for; the loss is 0."""
        del num_items_in_batch
        if self.is_sharded:
            model.train()
            self.accelerator.backward(0 * model(**self._prepare_inputs(inputs)).logits.sum())  # pyright: ignore
        return torch.zeros((), device=self.args.device)

    def begin_batch(self) -> None:
        """Seed the masks of dropout of a batch: no two batches have the same, whichever process computes them."""
        if size() > 1:
            self._seed(self._at * size() + rank())
            self._at += 1

    def end_step(self) -> None:
        """Make the gradients of the trained parameters those of all processes, and their next draws the same."""
        if size() > 1:
            share_gradients([p for p in self.model.parameters() if p.requires_grad])  # pyright: ignore
            self._seed("after")
            self._at = 0

    def _seed(self, number: object) -> None:
        text = f"{self.args.seed} {self.state.global_step} {number}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]))

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        if is_blank(inputs):
            inputs = {**inputs, "attention_mask": torch.zeros(1, dtype=torch.int64)}
        super()._track_num_input_tokens(inputs)

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the state of the first process alone, as one process does: others draw from seeds of their batches."""
        super()._save_rng_state(output_dir)
        if size() > 1:
            Path(output_dir, "rng_state_0.pth").rename(Path(output_dir, "rng_state.pth"))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if size() == 1:
            super()._load_rng_state(checkpoint)

    def add_tokens(self, count: int) -> None:
        """Count tokens that this process has seen."""
        self.state.num_input_tokens_seen += over_all([count], self.args.device)[0]
