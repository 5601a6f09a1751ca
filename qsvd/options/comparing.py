"""The options of `qsvd compare`: rows, budgets, learning rates, seeds, and what all runs share with `qsvd train`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from qsvd.option_types import (
    ABOVE_ZERO,
    ALL_ABOVE_ZERO,
    POSITIONAL,
    PRINTS,
    Accumulate,
    BatchSize,
    ComputeDtype,
    Device,
    Group,
    Help,
    LossOn,
    Map,
    MaxLength,
    Model,
    at_least,
)

ALL = "all"  # of --methods: every method that the model and the data can take


@dataclass(frozen=True)
class Compare:
    """Compare splits and adapter methods on equal terms.

    Every row, a split and a method, sweeps its learning rate by the validation loss of the first seed, then trains with
    all seeds at the best rate. The table has the loss on a test part that chose nothing. The same command continues a
    stopped comparison; several processes with it share the work.
    """

    model: Model
    data: Annotated[
        str,
        POSITIONAL,
        Help("Folder with train, valid and test files; or one file, which is divided 70:10:20.", "DATA"),
    ]
    out: Annotated[Path, Help("Folder for finished cells, table and plots.", "DIR")]

    methods: Annotated[
        tuple[str, ...],
        Group("row"),
        Help("Methods, each with options of qsvd train: lora 'lora --rslora'. all: every method.", "SPEC ..."),
    ] = ("lora", "pissa", "dora")
    splits: Annotated[
        tuple[str, ...],
        Help("Options of qsvd quantize: '--quality good'. Without --rank, 0 or as the method needs.", "SPEC ..."),
    ] = ()
    equal: Annotated[
        Literal["rank", "parameters", "bytes"],
        Help("What all rows have in common: rank, trained parameters, or bytes of model and adapter."),
    ] = "rank"
    size: Annotated[
        int | str | None,
        Help("Rank, parameters (300k) or bytes (3MB). Default: rank 16, or what the first row has at rank 16.", "SIZE"),
    ] = None

    rates: Annotated[
        tuple[float, ...],
        Group("repetition"),
        ALL_ABOVE_ZERO,
        Help("Learning rates to try. Default: five or more, until the best is between two others.", "NUMBER ..."),
    ] = ()
    seeds: Annotated[int, at_least(1), Help("Runs of every row at its best learning rate.")] = 3

    epochs: Annotated[float, Group("schedule"), ABOVE_ZERO, Help("Passes over the data.")] = 1.0
    steps: Annotated[int | None, at_least(1), Help("Optimizer steps of a run, instead of --epochs.")] = None
    batch_size: BatchSize = 4
    accumulate: Accumulate = 4

    task: Annotated[
        Literal["auto", "causal", "classification"],
        Group("data"),
        Help("causal: learn texts; classification: learn the column label. auto: by the columns and the model."),
    ] = "auto"
    chat_template: Annotated[str | None, Help("As in qsvd train. Default: the tokenizer's.", "NAME|FILE")] = None
    max_length: MaxLength = None
    loss_on: LossOn = "answers"
    map: Map = ()

    keep_runs: Annotated[bool, Group("run"), Help("Keep the folder of every run, with its adapter.")] = False
    dtype: ComputeDtype = "auto"
    device: Device = "auto"
    dry_run: Annotated[bool, PRINTS, Help("Check everything, print the rows and the number of runs, and stop.")] = False
