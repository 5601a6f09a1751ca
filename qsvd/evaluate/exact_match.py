"""Share of generated answers that end in the right number, as GSM8K is scored (arXiv:2110.14168).

Shape suffixes: N = sequences of one batch, T = tokens of the longest, G = generated tokens.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig, LogitsProcessor

from qsvd.errors import BadInput, NoResult, listing
from qsvd.evaluate.accuracy import Counted
from qsvd.evaluate.batches import ALONE, Model, Part, Tell, by_length, check_ready, check_sequences, padded, tell_nobody

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKER = "####"  # GSM8K puts it before the final number
NUMBER = re.compile(
    r"(?:(?<![\w)\].%])(?P<sign>[-+\u2212]))?"  # after a digit, a word or a bracket it is an operator
    r"(?:\$\s?(?P<late>[-\u2212])?)?"
    r"(?P<digits>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|(?<!\w)\.[0-9]+)"
)


@dataclass(frozen=True)
class ExactMatch(Counted):
    """Questions that were answered with the right number.

    unfinished is the number of answers that were cut at max_new_tokens; answers are the generated texts, in order.
    """

    unfinished: int
    answers: tuple[str, ...]


def final_number(text: str) -> str | None:
    """Return the final number of a text in one spelling: "$1,000.00" and "1000." are both "1000".

    It is the first number after the last "####", on the same line; without that mark, the last number of the text. None
    if there is no such number; a mark without a number after it is a missing answer. Commas separate thousands.
    """
    _, marker, after = text.rpartition(MARKER)
    numbers = list(NUMBER.finditer(after.partition("\n")[0] if marker else text))
    if not numbers:
        return None
    found = numbers[0 if marker else -1]
    value = format(Decimal(found["digits"].replace(",", "")), "f")
    value = value.rstrip("0").rstrip(".") if "." in value else value
    negative = found["late"] is not None or found["sign"] not in (None, "+")
    return f"-{value}" if negative and value != "0" else value


def exact_match(  # noqa: PLR0913  # each is a choice of its own
    model: Model,
    questions: Sequence[list[int]],
    answers: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_new_tokens: int,
    batch: int = 8,
    tell: Tell = tell_nobody,
    part: Part = ALONE,
) -> ExactMatch:
    """Generate an answer to each question, greedily, and compare its final number with that of the given answer.

    Args:
        model: A causal language model in evaluation mode. Sampling, beams, penalties and lengths of its generation
            config are ignored.
        questions: Token ids of each prompt, as the model expects them before an answer.
        answers: The right answer to each question, as in GSM8K: "... #### 72" or only the number.
        tokenizer: Decodes the answers. Its end token and those of the model's generation config end an answer.
        max_new_tokens: An answer is cut after so many tokens, and scored as it is.
        batch: Questions of one forward pass, of similar length.
        tell: Is called after every batch with the number of its questions.
        part: Which batches this process answers; all processes return all answers.

    Raises:
        BadInput: batch or max_new_tokens is below 1; the model is in training mode or cannot generate; no end token is
            known; there are no questions, or not as many answers; a question is empty, too long or has a token outside
            the vocabulary; an answer has no number.
    """
    check_ready(model, batch)
    gold = _gold(questions, answers)
    if max_new_tokens < 1:
        raise BadInput(f"max_new_tokens {max_new_tokens} is below 1")
    ends = end_tokens(model, tokenizer)
    check_sequences(model, questions, pad_token=ends[0], room=max_new_tokens)
    found, texts, unfinished = list[tuple[int, str, bool]](), [""] * len(gold), 0
    for indices in part.of(by_length(questions, batch)):
        generated = greedy(model, [questions[i] for i in indices], ends, max_new_tokens)
        for index, tokens in zip(indices, generated, strict=True):
            length = next((place for place, token in enumerate(tokens) if token in ends), None)
            text = str(tokenizer.decode(tokens[:length], skip_special_tokens=True))
            found.append((index, text, length is None))
        tell(len(indices))
    for index, text, is_cut in part.joined(found):
        texts[index] = text
        unfinished += is_cut
    correct = sum(final_number(text) == number for text, number in zip(texts, gold, strict=True))
    return ExactMatch(correct, len(gold), unfinished, tuple(texts))


class FiniteLogits(LogitsProcessor):
    """Ends the work where the logits of an answer are NaN: the largest of them is a token all the same."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        if scores.isnan().any():
            raise NoResult(
                "the model's logits are NaN: numbers of it are NaN or infinite, or overflow while it runs; give "
                "--dtype float32, or check its files"
            )
        return scores


@torch.inference_mode()
def greedy(model: Model, group: list[list[int]], ends: list[int], max_new_tokens: int) -> list[list[int]]:
    """Return token ids [N, G] after each prompt; after an end token, more end tokens follow.

    Raises:
        NoResult: logits are NaN.
    """
    # Padding with an end token: every vocabulary has one, not every one has a pad token. The mask hides it on the left.
    tokens_NT, mask_NT = padded(model, group, ends[0], left=True)
    # Everything that is not named here would come from the model's generation config.
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=ends[0],
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_new_tokens=0,
        use_cache=True,
        return_dict_in_generate=False,
    )
    generate = model.generate
    assert callable(generate), "models that can generate have the method"
    inputs = {"input_ids": tokens_NT, "attention_mask": mask_NT}
    output_NT = generate(**inputs, generation_config=greedy, logits_processor=[FiniteLogits()])
    assert isinstance(output_NT, torch.Tensor), "without return_dict_in_generate the answer is token ids"
    begin = 1 if model.config.is_encoder_decoder else tokens_NT.shape[1]  # a decoder starts with a token of its own
    return output_NT[:, begin:].tolist()


def end_tokens(model: Model, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return token ids that end an answer: of the tokenizer, and of the model, since chat models have several."""
    if not model.can_generate():
        raise BadInput(f"{type(model).__name__} generates no text: load the model as AutoModelForCausalLM")
    own = model.generation_config.eos_token_id
    known = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    ends = sorted({token for token in known if isinstance(token, int)})
    if not ends:
        raise BadInput("neither the tokenizer nor the model's generation config names an end token: set eos_token")
    return ends


def _gold(questions: Sequence[list[int]], answers: Sequence[str]) -> list[str]:
    """Return the number of each answer."""
    if len(questions) != len(answers):
        raise BadInput(f"{len(questions)} questions have {len(answers)} answers: give one to each")
    numbers = [final_number(answer) for answer in answers]
    missing = [f"{i} ({answers[i][-40:]!r})" for i, number in enumerate(numbers) if number is None]
    if missing:
        raise BadInput(f"answer {listing(missing)} has no final number to compare with")
    return [number for number in numbers if number is not None]
