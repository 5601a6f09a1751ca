"""How often a model's generated answer ends in the right number, as GSM8K is scored (arXiv:2110.14168).

Shape suffixes: N = sequences of one batch, T = tokens of the longest, G = generated tokens.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig

from qsvd.errors import BadInput, listing
from qsvd.evaluate.accuracy import wilson_interval
from qsvd.evaluate.batches import Model, by_length, check_ready, check_sequences, padded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKER = "####"  # GSM8K writes it before the final number
NUMBER = re.compile(
    r"(?:(?<![\w)\].%])(?P<sign>[-+\u2212]))?"  # after a digit, a word or a bracket it is an operator
    r"(?:\$\s?(?P<late>[-\u2212])?)?"
    r"(?P<digits>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|(?<!\w)\.[0-9]+)"
)


@dataclass(frozen=True)
class ExactMatch:
    """Questions answered with the right number.

    unfinished is how many answers were cut at max_new_tokens; answers are the generated texts, in order.
    """

    correct: int
    total: int
    unfinished: int
    answers: tuple[str, ...]

    @property
    def share(self) -> float:
        """Correct answers among all, 0..1."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """The share's 95% interval (Wilson)."""
        return wilson_interval(self.correct, self.total)


def final_number(text: str) -> str | None:
    """The answer that a text ends in, in one spelling: "$1,000.00" and "1000." are both "1000".

    The first number after the last "####", on its line; in a text without that mark the last number. None where there
    is no such number: a mark with nothing after it is an answer that was not given. Commas group by three digits.
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


def exact_match(
    model: Model,
    questions: Sequence[list[int]],
    answers: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_new_tokens: int,
    batch: int = 8,
) -> ExactMatch:
    """Generate an answer to each question, greedily, and compare its final number with that of the given answer.

    Args:
        model: A causal language model in evaluation mode; what its generation config says of sampling, beams,
            penalties and lengths is set aside.
        questions: Token ids of each prompt, as the model expects them before an answer.
        answers: Text of the right answer to each, as in GSM8K: "... #### 72" or the number alone.
        tokenizer: Spells the generated tokens; its end token, and those of the model's generation config, end one.
        max_new_tokens: Tokens after which an answer is cut, and counted by what it says so far.
        batch: Questions that go through the model together, alike in length.

    Raises:
        BadInput: batch or max_new_tokens is below 1, the model is in training mode or cannot generate, no end token
            is known, there are no questions or not as many answers, a question is empty, too long or has a token
            outside the vocabulary, or an answer has no number.
    """
    check_ready(model, batch)
    gold = _gold(questions, answers)
    if max_new_tokens < 1:
        raise BadInput(f"max_new_tokens {max_new_tokens} is below 1, the least that can hold a number")
    ends = _end_tokens(model, tokenizer)
    check_sequences(model, questions, pad_token=ends[0], room=max_new_tokens)
    texts, unfinished = [""] * len(gold), 0
    for indices in by_length(questions, batch):
        generated = _generate(model, [questions[i] for i in indices], ends, max_new_tokens)
        for index, tokens in zip(indices, generated, strict=True):
            length = next((place for place, token in enumerate(tokens) if token in ends), None)
            unfinished += length is None
            texts[index] = str(tokenizer.decode(tokens[:length], skip_special_tokens=True))
    correct = sum(final_number(text) == number for text, number in zip(texts, gold, strict=True))
    return ExactMatch(correct, len(gold), unfinished, tuple(texts))


@torch.inference_mode()
def _generate(model: Model, group: list[list[int]], ends: list[int], max_new_tokens: int) -> list[list[int]]:
    """Token ids [N, G] after each prompt; after an end token come more of them."""
    # An end token is in every vocabulary, as a pad token is not. The mask hides it on the left; on the right it ends.
    tokens_NT, mask_NT = padded(model, group, ends[0], left=True)
    # What is not named here would be taken from the model's own generation config.
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
    assert callable(generate), "a model that can generate has the method"
    output_NT = generate(input_ids=tokens_NT, attention_mask=mask_NT, generation_config=greedy)
    assert isinstance(output_NT, torch.Tensor), "without return_dict_in_generate the answer is token ids"
    return output_NT[:, tokens_NT.shape[1] :].tolist()


def _end_tokens(model: Model, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Token ids that end an answer: the tokenizer's, and the model's own, which chat models have more of."""
    if not model.can_generate():
        raise BadInput(f"{type(model).__name__} generates no text: load the model as AutoModelForCausalLM")
    own = model.generation_config.eos_token_id
    known = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    ends = sorted({token for token in known if isinstance(token, int)})
    if not ends:
        raise BadInput("neither the tokenizer nor the model's generation config names an end token: set eos_token")
    return ends


def _gold(questions: Sequence[list[int]], answers: Sequence[str]) -> list[str]:
    """The number of each answer."""
    if len(questions) != len(answers):
        raise BadInput(f"{len(questions)} questions have {len(answers)} answers: give one to each")
    numbers = [final_number(answer) for answer in answers]
    missing = [f"{i} ({answers[i][-40:]!r})" for i, number in enumerate(numbers) if number is None]
    if missing:
        raise BadInput(f"answer {listing(missing)} has no final number, which is what is compared")
    return [number for number in numbers if number is not None]
