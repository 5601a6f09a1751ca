"""`qsvd eval`: perplexity, accuracy or exact match of several models on one data set."""

import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from qsvd import ranks
from qsvd.console.progress import display, quiet, say, terminal
from qsvd.data.encoder_decoder import sources_and_targets
from qsvd.data.examples import is_encoder_decoder, positions, stop_ids, tokenize_speech
from qsvd.data.images import tokenize_images
from qsvd.data.masks import ends_of_turn
from qsvd.data.tokens import question_prompts, tokenize
from qsvd.errors import BadInput, NoResult, listing
from qsvd.evaluate.accuracy import accuracy, mean_loss
from qsvd.evaluate.batches import Tell, every_process
from qsvd.evaluate.divergence import Divergence, divergence_of_documents, divergence_of_text
from qsvd.evaluate.exact_match import exact_match
from qsvd.evaluate.perplexity import perplexity_of_documents, perplexity_of_text, slide
from qsvd.evaluate.written import written_loss
from qsvd.files.split_folder import open_split
from qsvd.memory.block_bytes import Batch
from qsvd.memory.items import EVERYTHING, Placement
from qsvd.memory.placement import Wish
from qsvd.options import Eval
from qsvd.plan.weights import context_length
from qsvd.prepare.evaluate import EvalRun, Subject, prepare_eval
from qsvd.prepare.machine import machine, place_reading
from qsvd.prepare.models import NamedModel, class_names, load_model, record_of
from qsvd.records import Progress, ShowProgress, show_nothing
from qsvd.report.evaluation import ModelScores, evaluation_json, evaluation_table
from qsvd.report.results import EvalResult

MOST_WINDOW = 2048  # tokens, unless more are asked for
MOST_NEW_TOKENS = 512  # unless more are asked for
Values = dict[str, float]


def main(options: Eval) -> None:
    """Run `qsvd eval`: 1 check, 2 measure every model, 3 print a table or JSON.

    Several processes divide the batches of 2.
    """
    with display() as show:
        measured = evaluate(options, show)
    if options.json:
        say(json.dumps(evaluation_json(measured.rows, measured.how), indent=2))
    else:
        title = ", ".join(f"{name} {value}" for name, value in measured.how.items() if value is not None)
        terminal().print(evaluation_table(measured.rows, title))


def evaluate(options: Eval, show: ShowProgress = show_nothing) -> EvalResult:
    """Measure every model as `qsvd eval` does, silently, and return the columns of its table.

    Raises:
        BadInput: an option, a model or the data cannot be used.
        DoesNotFit: there is too little memory.
    """
    with quiet():
        run = ranks.main_first(lambda: prepare_eval(options))
        rows = []
        for number, one in enumerate(run.subjects):
            shown = Shown(show, number, len(run.subjects), one.found.name)
            rows.append(ModelScores(one.found.name, one.found.kind, _finite(one, _measure(one, run, shown))))
        return EvalResult(tuple(rows), _how(run))


class Shown:
    """Shows how much of one model's measurement is done; every model counts the same.

    Args:
        show: Shows progress of the command.
        number, models: Index of the model, and how many there are.
        name: Of the model.
    """

    def __init__(self, show: ShowProgress, number: int, models: int, name: str):
        self._show, self._number, self._models, self._name = show, number, models, name

    def of(self, total: int, unit: str) -> Tell:
        """Return the function that is called with the number of units that are new."""
        done = 0

        def tell(new: int) -> None:
            nonlocal done
            done = min(total, done + new * ranks.size())  # the others are about as far
            share = self._number + done / total
            self._show(Progress(share, share, self._models, f"{self._name}: {done:,}/{total:,} {unit}"))

        return tell


def _measure(subject: Subject, run: EvalRun, shown: Shown) -> Values:
    """Return all values of one model; its memory is free afterwards."""
    measures = {"accuracy": _accuracy, "exact-match": _exact_match}
    is_text = run.examples.kind == "text"
    return measures.get(run.task, _perplexity if is_text else _answers)(subject, run, shown)


def _finite(subject: Subject, values: Values) -> Values:
    """Return the values of one model.

    Raises:
        NoResult: one is NaN or infinite.
    """
    wrong = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    if wrong:
        raise NoResult(
            f"{subject.found.name}: {listing(wrong)}: numbers of the model are NaN or infinite, or overflow while it "
            "runs; give --dtype float32, or check its files"
        )
    return values


def _perplexity(subject: Subject, run: EvalRun, shown: Shown) -> Values:
    if is_encoder_decoder(subject.found.home):
        raise BadInput(
            f"{subject.found.name} is an encoder-decoder model, which has no perplexity on plain texts; give examples "
            "with the columns prompt and completion"
        )
    documents = _documents(subject, run)
    if run.reference is not None and _documents(run.reference, run) != documents:
        raise BadInput(
            f"{subject.found.name} and {run.reference.found.name} tokenize the text differently, so tokens cannot be "
            "compared; give the 16-bit model that it was made from"
        )
    model = _load(subject, run)
    window = _window(context_length(model.config), subject, run.options)
    stride = run.options.stride or max(1, window // 2) if run.is_one_text else window
    values: Values = {"window": window}
    tell = shown.of(_predictions(documents, window, stride, run), "tokens")
    how: dict[str, Any] = {"window": window, "batch": run.options.batch_size, "tell": tell, "part": every_process()}
    if run.is_one_text:
        values["stride"] = stride
        compare: Callable[..., Divergence] = partial(divergence_of_text, tokens=documents[0], stride=stride, **how)
        measured = perplexity_of_text(model, documents[0], stride=stride, **how)
    else:
        compare = partial(divergence_of_documents, documents=documents, **how)
        measured = perplexity_of_documents(model, documents, **how)
        values["shortened"] = sum(len(document) > window for document in documents)
    values |= {"perplexity": measured.perplexity, "nats": measured.nats, "tokens": measured.tokens}
    if run.reference is None:
        return values
    reference = _load(run.reference, run)
    found = compare(model, reference)
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


def _predictions(documents: list[list[int]], window: int, stride: int, run: EvalRun) -> int:
    """Return the number of predictions of all measures."""
    if run.is_one_text:
        once = sum(len(tokens) - 1 - skip for tokens, skip in slide(documents[0], window, stride) if tokens)
    else:
        once = sum(max(0, min(len(document), window) - 1) for document in documents)
    return once * (1 if run.reference is None else 2)


def _documents(subject: Subject, run: EvalRun) -> list[list[int]]:
    return [subject.tokenizer(row["text"], verbose=False).input_ids for row in run.examples.rows]


def _answers(subject: Subject, run: EvalRun, shown: Shown) -> Values:
    """Return the perplexity of the answers, given their prompts."""
    window = _window(positions(subject.found.home), subject, run.options)
    cut: dict[str, Any] = {"max_length": window, "stop_ids": stop_ids(subject.found.home)}
    if run.examples.kind == "speech":
        data = tokenize_speech(run.examples, subject.found.home, window)
    elif subject.processor is None:
        data = tokenize(run.examples, subject.tokenizer, **cut)
    else:
        data = tokenize_images(run.examples, subject.processor, **cut)
    model = _load(subject, run, pixels=0 if data.media is None else run.options.batch_size * data.media.pixels)
    how: dict[str, Any] = {"pad_token": subject.tokenizer.pad_token_id, "batch": run.options.batch_size}
    how |= {"tell": shown.of(len(data.input_ids), "examples"), "part": every_process()}
    if data.media is not None:
        how["collate"] = data.media.batch
    if model.config.is_encoder_decoder:
        measured = written_loss(model, *sources_and_targets(data, subject.tokenizer), **how)
    else:
        pairs: list[Any] = list(zip(data.input_ids, data.labels, strict=True))
        measured = mean_loss(model, pairs, **how)
    values: Values = {"window": window, "shortened": data.truncated}
    return values | {"perplexity": measured.perplexity, "nats": measured.nats, "tokens": measured.tokens}


def _accuracy(subject: Subject, run: EvalRun, shown: Shown) -> Values:
    model = _load(subject, run)
    window = _window(context_length(model.config), subject, run.options)
    names = subject.found.labels or class_names(model.config, run.examples)
    data = tokenize(run.examples, subject.tokenizer, max_length=window, label_names=names)
    pairs: list[Any] = list(zip(data.input_ids, data.labels, strict=True))
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = subject.tokenizer.pad_token_id
    batch, segments = run.options.batch_size, data.token_types
    measured = accuracy(
        model,
        pairs,
        pad_token=config.pad_token_id,
        batch=batch,
        segments=segments,
        tell=shown.of(len(pairs), "examples"),
        part=every_process(),
    )
    low, high = measured.interval
    return {
        "window": window,
        "shortened": data.truncated,
        "accuracy": measured.share,
        "low": low,
        "high": high,
        "correct": measured.correct,
        "total": measured.total,
        "label_nats": measured.nats,
    }


def _exact_match(subject: Subject, run: EvalRun, shown: Shown) -> Values:
    prompts = question_prompts([row["prompt"] for row in run.examples.rows], subject.tokenizer)
    model = _load(subject, run)
    if subject.found.chat_template is not None:
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        model.generation_config.eos_token_id = [*ends, *ends_of_turn(subject.tokenizer)]
    left = context_length(model.config) - max(map(len, prompts))
    new_tokens = run.options.max_new_tokens or max(1, min(MOST_NEW_TOKENS, left))
    measured = exact_match(
        model,
        prompts,
        [row["completion"] for row in run.examples.rows],
        subject.tokenizer,
        max_new_tokens=new_tokens,
        batch=run.options.batch_size,
        tell=shown.of(len(prompts), "answers"),
        part=every_process(),
    )
    low, high = measured.interval
    return {
        "exact_match": measured.share,
        "low": low,
        "high": high,
        "correct": measured.correct,
        "total": measured.total,
        "unfinished": measured.unfinished,
        "max_new_tokens": new_tokens,
    }


def _load(subject: Subject, run: EvalRun, pixels: int = 0) -> Any:
    """Load a model; as many blocks stay on the device as fit beside the numbers of a batch's images or sounds."""
    is_classifier = run.task == "accuracy"
    placement = EVERYTHING if subject.found.kind == "16-bit" else _placement(subject.found, run, pixels)
    return load_model(subject.found, run.device, run.dtype, classifier=is_classifier, placement=placement)


def _placement(found: NamedModel, run: EvalRun, pixels: int) -> Placement:
    split = open_split(found.home)
    tokens = min(run.options.window or MOST_WINDOW, positions(split.folder))
    batch = Batch(tokens, run.options.batch_size, is_masked=True, checkpointing=True, device=run.device.type)
    wish, here = Wish(run.options.resident), machine(run.device, run.dtype)
    return place_reading(split, record_of(found, split), batch, wish, here, pixels=pixels)


def _window(context: int, subject: Subject, options: Eval) -> int:
    """Return --window, or the model's context, at most MOST_WINDOW."""
    if options.window is None:
        return min(MOST_WINDOW, context)
    if options.window > context:
        raise BadInput(f"--window {options.window} is above {context}, the context length of {subject.found.name}")
    return options.window


def _how(run: EvalRun) -> dict[str, object]:
    """Return how it was measured, for readers of the numbers."""
    options = run.options
    how: dict[str, object] = {"task": run.task, "data": options.data, "examples": len(run.examples.rows)}
    dtype = str(run.dtype).removeprefix("torch.")
    return how | {"dtype": dtype, "device": str(run.device), "reference": options.reference}
