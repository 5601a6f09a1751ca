"""Options of `qsvd eval` to a checked run: the models, the examples, the task."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from qsvd.data.columns import Examples, recognise
from qsvd.data.examples import check_hears, check_reads_images, mapping_of, open_tokenizer
from qsvd.data.images import open_processor
from qsvd.data.read import read_rows
from qsvd.errors import BadInput
from qsvd.evaluate.exact_match import MARKER, final_number
from qsvd.memory.device import device_of, dtype_of
from qsvd.options import Eval
from qsvd.prepare.check_options import check
from qsvd.prepare.models import NamedModel, check_kind, class_of, find_model


@dataclass(frozen=True)
class Subject:
    """A model to measure, with its tokenizer, and its processor if the examples have images; not loaded yet."""

    found: NamedModel
    tokenizer: Any
    processor: Any = None


@dataclass(frozen=True)
class EvalRun:
    """A checked run of `qsvd eval`."""

    options: Eval
    subjects: tuple[Subject, ...]
    examples: Examples
    is_one_text: bool
    task: str
    reference: Subject | None
    device: torch.device
    dtype: torch.dtype


def prepare_eval(options: Eval) -> EvalRun:
    """Open models and data, and refuse what cannot be measured, before a model is loaded."""
    check(options)
    device = device_of(options.device)
    examples = recognise(read_rows(options.data, split=options.split), mapping_of(options.map))
    task = _task(options, examples)
    is_one_text = examples.kind == "text" and not examples.places.unit
    if options.stride is not None and not is_one_text:
        raise BadInput(f"--stride {options.stride} is for one text, such as a .txt file; {options.data} holds several")
    if options.reference is not None and examples.kind != "text":
        raise BadInput(f"--reference compares models on text; {options.data} holds {examples.kind} examples")
    if options.limit is not None:
        first = range(min(options.limit, len(examples.rows)))
        examples = replace(examples, rows=examples.rows[: len(first)], places=examples.places.take(first))
    if task == "exact-match":
        _check_answers(examples)
    subjects = tuple(_subject(name, options, task, examples) for name in options.models)
    reference = None if options.reference is None else _subject(options.reference, options, task, examples)
    return EvalRun(options, subjects, examples, is_one_text, task, reference, device, dtype_of(options.dtype, device))


def _check_answers(examples: Examples) -> None:
    answers = [row["completion"] for row in examples.rows]
    without = [examples.where(i) for i, answer in enumerate(answers) if final_number(answer) is None]
    if without:
        raise BadInput(f"{without[0]}: the answer has no number to compare with ({len(without)} such rows)")


def _subject(name: str, options: Eval, task: str, examples: Examples) -> Subject:
    found = find_model(name, options.base)
    check_kind(found, classifier=task == "accuracy")
    check_hears(class_of(found), name, examples)
    if examples.kind == "speech":
        processor = open_processor(found.home, of="sound")
        return Subject(found, processor.tokenizer, processor)
    if examples.has_images:
        check_reads_images(class_of(found), name, examples.places.source)
        processor = open_processor(found.home, found.chat_template)
        return Subject(found, processor.tokenizer, processor)
    return Subject(found, open_tokenizer(found.home, found.chat_template))


def _task(options: Eval, examples: Examples) -> str:
    """Return --task, or the task that the data are for."""
    is_question = examples.kind == "pair" and all(isinstance(row["prompt"], str) for row in examples.rows)
    fits = {
        "perplexity": examples.kind != "labelled",
        "accuracy": examples.kind == "labelled",
        "exact-match": is_question and not examples.has_images,
    }
    if options.task != "auto":
        if not fits[options.task]:
            what = f"{examples.kind} examples{' with images' if examples.has_images else ''}"
            raise BadInput(f"--task {options.task} does not go with {what}, as {options.data} has")
        return options.task
    if fits["accuracy"]:
        return "accuracy"
    if fits["exact-match"] and all(MARKER in row["completion"] for row in examples.rows):
        return "exact-match"
    return "perplexity"
