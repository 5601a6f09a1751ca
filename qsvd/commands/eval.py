"""`qsvd eval`: perplexity, accuracy or exact match of several models on one data set."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoTokenizer

from qsvd.commands.device import device_of
from qsvd.commands.open_model import NamedModel, dtype_of, find_model, load_model
from qsvd.commands.prepare_run import mapping_of, stop_ids
from qsvd.commands.quiet import quiet
from qsvd.evaluate.accuracy import accuracy
from qsvd.evaluate.divergence import Divergence, divergence_of_documents, divergence_of_text
from qsvd.evaluate.exact_match import MARKER, exact_match, final_number
from qsvd.evaluate.held_out import mean_loss
from qsvd.evaluate.perplexity import perplexity_of_documents, perplexity_of_text
from qsvd.options import Eval
from qsvd.report.evaluation import Measured, evaluation_json, evaluation_table
from qsvd.train.columns import Examples, recognise
from qsvd.train.read import read_rows
from qsvd.train.tokens import question_prompts, tokenize

MOST_WINDOW = 2048  # tokens, unless more are asked for
Values = dict[str, float]


@dataclass(frozen=True)
class Work:
    """What is measured, and how."""

    options: Eval
    examples: Examples
    is_one_text: bool
    task: str
    reference: NamedModel | None
    device: torch.device
    dtype: torch.dtype


def main(options: Eval) -> None:
    """Print a table, or JSON."""
    models = [find_model(name, options.base) for name in options.models]
    work = _work(options)
    with quiet():
        measured = [Measured(model.name, model.kind, _measure(model, work)) for model in models]
    if options.json:
        print(json.dumps(evaluation_json(measured, _how(work)), indent=2))
    else:
        title = ", ".join(f"{name} {value}" for name, value in _how(work).items() if value is not None)
        Console().print(evaluation_table(measured, title))


def _work(options: Eval) -> Work:
    """Everything that can be refused before a model is loaded.

    Raises:
        ValueError: an option or the data is not usable.
    """
    least = {"batch-size": options.batch_size, "max-new-tokens": options.max_new_tokens, "limit": options.limit}
    wrong = [f"--{name} {value} is below 1" for name, value in least.items() if value is not None and value < 1]
    if not options.models:
        wrong.append("no model is given: name at least one folder")
    if wrong:
        raise ValueError("; ".join(wrong))
    rows = read_rows(options.data, split=options.split)
    examples = recognise(rows, mapping_of(options.map))
    task = _task(options, examples)
    reference = None
    if options.reference is not None:
        if task != "perplexity" or examples.kind != "text":
            raise ValueError("--reference compares models on text; the data holds " + examples.kind + " examples")
        reference = find_model(options.reference, options.base)
    if options.limit is not None:
        count = min(options.limit, len(examples.rows))
        examples = Examples(
            examples.kind, examples.rows[:count], examples.places.take(list(range(count))), examples.literal
        )
    device = device_of(options.device)
    is_one_text = examples.kind == "text" and not examples.places.unit
    return Work(options, examples, is_one_text, task, reference, device, dtype_of(options.dtype, device))


def _task(options: Eval, examples: Examples) -> str:
    """As asked for, or by what the data is."""
    is_question = examples.kind == "pair" and all(isinstance(row["prompt"], str) for row in examples.rows)
    fits = {
        "perplexity": examples.kind != "labelled",
        "accuracy": examples.kind == "labelled",
        "exact-match": is_question,
    }
    if options.task != "auto":
        if not fits[options.task]:
            raise ValueError(f"--task {options.task} does not go with {examples.kind} examples, as {options.data} has")
        return options.task
    if fits["accuracy"]:
        return "accuracy"
    if is_question and all(MARKER in row["completion"] for row in examples.rows):
        return "exact-match"
    return "perplexity"


def _measure(found: NamedModel, work: Work) -> Values:
    """All values of one model, which is gone afterwards."""
    tokenizer = AutoTokenizer.from_pretrained(
        Path(found.home).expanduser() if Path(found.home).is_dir() else found.home
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    model = load_model(found, work.device, work.dtype, classifier=work.task == "accuracy")
    if work.task == "accuracy":
        return _accuracy(model, tokenizer, found, work)
    if work.task == "exact-match":
        return _exact_match(model, tokenizer, work)
    if work.examples.kind == "text":
        return _perplexity(model, tokenizer, work)
    return _answers(model, tokenizer, found, work)


def _perplexity(model: Any, tokenizer: Any, work: Work) -> Values:
    window = _window(model, work.options)
    documents = [tokenizer(row["text"], verbose=False).input_ids for row in work.examples.rows]
    if work.is_one_text:
        stride = work.options.stride or max(1, window // 2)
        of_text = partial(perplexity_of_text, tokens=documents[0], window=window, stride=stride)
        compare: Callable[..., Divergence] = partial(
            divergence_of_text, tokens=documents[0], window=window, stride=stride
        )
        measured = of_text(model, batch=work.options.batch_size)
    else:
        compare = partial(divergence_of_documents, documents=documents, window=window)
        measured = perplexity_of_documents(model, documents, window=window, batch=work.options.batch_size)
    values: Values = {"perplexity": measured.perplexity, "nats": measured.nats, "tokens": measured.tokens}
    if work.reference is None:
        return values
    reference = load_model(work.reference, work.device, work.dtype)
    found = compare(model, reference, batch=work.options.batch_size)
    return values | {
        "kl_mean": found.mean,
        "kl_mean_error": found.mean_error,
        "kl_median": found.median,
        "kl_90": found.percentile_90,
        "kl_95": found.percentile_95,
        "kl_99": found.percentile_99,
        "kl_maximum": found.maximum,
        "top_token_agreement": found.top_token_agreement,
        "top_token_agreement_error": found.top_token_agreement_error,
        "log_perplexity_ratio": found.log_perplexity_ratio,
        "log_perplexity_ratio_error": found.log_perplexity_ratio_error,
    }


def _answers(model: Any, tokenizer: Any, found: NamedModel, work: Work) -> Values:
    """Perplexity of the answers, given what stands before them."""
    ends = stop_ids(Path(found.home)) if Path(found.home).is_dir() else ()
    data = tokenize(work.examples, tokenizer, max_length=_window(model, work.options), stop_ids=ends)
    pairs: list[Any] = list(zip(data.input_ids, data.labels, strict=True))
    measured = mean_loss(model, pairs, pad_token=tokenizer.pad_token_id, batch=work.options.batch_size)
    return {"perplexity": measured.perplexity, "nats": measured.nats, "tokens": measured.tokens}


def _accuracy(model: Any, tokenizer: Any, found: NamedModel, work: Work) -> Values:
    names = found.labels or tuple(model.config.id2label[number] for number in sorted(model.config.id2label))
    data = tokenize(
        work.examples, tokenizer, max_length=_window(model, work.options), label_names=names if found.labels else None
    )
    pairs: list[Any] = list(zip(data.input_ids, data.labels, strict=True))
    measured = accuracy(model, pairs, pad_token=tokenizer.pad_token_id, batch=work.options.batch_size)
    low, high = measured.interval
    return {
        "accuracy": measured.share,
        "low": low,
        "high": high,
        "correct": measured.correct,
        "total": measured.total,
        "nats": measured.nats,
    }


def _exact_match(model: Any, tokenizer: Any, work: Work) -> Values:
    answers = [row["completion"] for row in work.examples.rows]
    without = [work.examples.where(i) for i, answer in enumerate(answers) if final_number(answer) is None]
    if without:
        raise ValueError(f"{without[0]}: the answer has no number to compare with ({len(without)} such rows)")
    prompts = question_prompts([row["prompt"] for row in work.examples.rows], tokenizer)
    measured = exact_match(
        model,
        prompts,
        answers,
        tokenizer,
        max_new_tokens=work.options.max_new_tokens,
        batch=work.options.batch_size,
    )
    low, high = measured.interval
    return {
        "exact_match": measured.share,
        "low": low,
        "high": high,
        "correct": measured.correct,
        "total": measured.total,
        "unfinished": measured.unfinished,
    }


def _window(model: Any, options: Eval) -> int:
    if options.window is not None:
        return options.window
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(MOST_WINDOW, context or MOST_WINDOW)


def _how(work: Work) -> dict[str, object]:
    """How it was measured, for whoever reads the numbers."""
    options = work.options
    how: dict[str, object] = {"task": work.task, "data": options.data}
    if work.task == "perplexity":
        how |= {"window": options.window or f"context, at most {MOST_WINDOW}"}
        if work.is_one_text:
            how |= {"stride": options.stride or "half a window"}
    if work.task == "exact-match":
        how |= {"max new tokens": options.max_new_tokens}
    how |= {"dtype": str(work.dtype).removeprefix("torch."), "reference": options.reference}
    return how
