"""Prompt and completion as source and target, against what the tokenizers themselves write around a text."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from qsvd.data.columns import recognise
from qsvd.data.encoder_decoder import sources_and_targets
from qsvd.data.read import read_rows
from qsvd.data.tokens import tokenize

WORDS = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "a", "b", "c", "d", "\n"])}


def tokenizer(template):
    backend = Tokenizer(models.WordLevel(WORDS, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    marks = [(name, WORDS[name]) for name in ("<s>", "</s>") if name in template]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=marks)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def tokenized(tmp_path, rows, template):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(f"{row}\n" for row in rows))
    made = tokenizer(template)
    return tokenize(recognise(read_rows(str(file)), {}), made, max_length=32), made


@pytest.mark.parametrize(("template", "start"), [("$A </s>", []), ("<s> $A </s>", ["<s>"])])  # T5's, BART's
def test_both_have_the_tokens_that_the_tokenizer_puts_around_a_text(tmp_path, template, start):
    data, made = tokenized(tmp_path, ['{"prompt": "a b ", "completion": "c d"}'], template)
    sources, targets = sources_and_targets(data, made)
    words = [made.convert_ids_to_tokens(tokens[0]) for tokens in (sources, targets)]
    assert words == [[*start, "a", "b", "</s>"], [*start, "c", "d", "</s>"]]
    assert (sources, targets) == ([made("a b ")["input_ids"]], [made("c d")["input_ids"]])


def test_a_text_without_a_prompt_is_refused(tmp_path):
    data, made = tokenized(tmp_path, ['{"text": "a b"}'], "$A </s>")
    with pytest.raises(ValueError, match=r"line 1 has no prompt: an encoder-decoder model reads a prompt"):
        sources_and_targets(data, made)
