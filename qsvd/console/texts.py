"""What a model writes after a few prompts of a run, before and after training, for its page."""

import sys
from dataclasses import replace
from typing import Any

import torch

from qsvd.adapters.model import is_sharded
from qsvd.console.progress import say
from qsvd.data.columns import Tokenized
from qsvd.data.encoder_decoder import answer_begins, sources_and_targets
from qsvd.errors import QsvdError, first_line
from qsvd.evaluate.exact_match import end_tokens, greedy
from qsvd.plan.weights import context_length
from qsvd.prepare.train import TrainRun
from qsvd.records import Texts, Written

EXAMPLES = 3
PROMPT_TOKENS, NEW_TOKENS, LEAST_NEW_TOKENS = 64, 40, 8
SHARE = 4  # batches of a run for each new token; a batch decodes every weight three times, a new token twice in all

# Of a model, or of transformers with a model that it cannot let write; a text for people does not end a run.
FAULTS = (QsvdError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def texts_before(run: TrainRun, model: Any) -> Texts | None:
    """Return what the model writes before the first step; None where it writes no text, or the run is short.

    None, too, of a model that several processes hold together: one of them cannot run it.

    The prompts are those of the first held-out examples, of the first examples without them.
    """
    count = min(NEW_TOKENS, run.total_steps * run.settings.accumulate // SHARE)
    if count < LEAST_NEW_TOKENS or run.data.train.label_names or run.data.train.media is not None or is_sharded(model):
        return None
    prompts, expected = _prompts(run, model, count)
    written = None if not all(prompts) else _written(run, model, prompts, count)
    if written is None:
        return None
    texts = ([_text(run, tokens) for tokens in some] for some in (prompts, expected))
    return Texts(count, tuple(Written(*each) for each in zip(*texts, written, strict=True)))


def texts_after(run: TrainRun, model: Any, texts: Texts | None) -> Texts | None:
    """Return the texts with what the model writes now."""
    if texts is None or is_sharded(model):
        return texts
    written = _written(run, model, _prompts(run, model, texts.new_tokens)[0], texts.new_tokens)
    if written is None or len(written) != len(texts.examples):
        return texts
    pairs = zip(texts.examples, written, strict=True)
    return replace(texts, examples=tuple(replace(example, after=text) for example, text in pairs))


def _prompts(run: TrainRun, model: Any, count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return the tokens of each prompt, and those that the data have after it."""
    data = run.data.held_out or run.data.train
    first = Tokenized(data.kind, data.input_ids[:EXAMPLES], data.labels[:EXAMPLES], data.places)
    if run.data.is_encoder_decoder:
        sources, targets = sources_and_targets(first, run.data.tokenizer)
        return [tokens[-PROMPT_TOKENS:] for tokens in sources], [tokens[:count] for tokens in targets]
    most = min(PROMPT_TOKENS, context_length(model.config) - count)
    prompts, expected = [], []
    for tokens, labels in zip(first.input_ids, first.labels, strict=True):
        assert isinstance(labels, list), "a classifier writes no text"
        begin = answer_begins(labels)
        if begin <= 1:  # all of it is trained: the first half is the prompt
            begin = min(most, len(tokens) // 2)
        prompts.append(tokens[max(0, begin - most) : begin])
        expected.append(tokens[begin : begin + count])
    return prompts, expected


def _written(run: TrainRun, model: Any, prompts: list[list[int]], count: int) -> list[str] | None:
    """Return what the model writes, greedily, at most `count` tokens each; None where it writes no text.

    No draw and no state of the training depends on it.
    """
    was_training, devices = model.training, [run.device] if run.device.type == "cuda" else []
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices):
            ends = end_tokens(model, run.data.tokenizer)
            found = greedy(model, prompts, ends, count)
    except FAULTS as error:
        say(f"the page of this run will have no new texts: {first_line(error)}", file=sys.stderr)
        return None
    finally:
        model.train(was_training)
    return [_text(run, tokens) for tokens in found]


def _text(run: TrainRun, tokens: list[int]) -> str:
    return str(run.data.tokenizer.decode(tokens, skip_special_tokens=True))
