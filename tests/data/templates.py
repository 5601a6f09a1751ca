"""What is tokenized in tests, and with what: small conversations, chat templates, the tokenizers of real models."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

import qsvd
from qsvd.data.columns import recognise
from qsvd.data.row_files import Places, Rows
from qsvd.data.tokens import tokenize

DEMO = Path(qsvd.__file__).parent / "demo" / "model"
SHARED = Path(__file__).parents[3] / "shared"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}\n{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
NO_END = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRIPS_EARLIER = (  # as reasoning models do: what an earlier turn thought is not shown again
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]

SINGLE = [{"role": "user", "content": "Where is Zoë?"}, {"role": "assistant", "content": "In Köln 🙂."}]
DOUBLE = [
    {"role": "system", "content": "Be brief."},
    *SINGLE,
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes.\n\nVery."},
    {"role": "user", "content": "Thanks"},
]


def demo(template=None, marks=()):
    """The demo model's tokenizer; chat templates need the marks that they write as tokens."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    if marks:
        tokenizer.add_special_tokens({"extra_special_tokens": list(marks)})
    tokenizer.chat_template = template
    return tokenizer


def shared(name):
    """The tokenizer of a model in ../shared."""
    folder = SHARED / "models" / name
    if not folder.exists():
        pytest.skip(f"../shared/models/{name} is not there")
    return AutoTokenizer.from_pretrained(folder)


def tokenized(rows, tokenizer, **options):
    """Rows of "t.jsonl", one per line, as they are trained."""
    places = Places("t.jsonl", "line", range(1, len(rows) + 1))
    return tokenize(recognise(Rows(list(rows), places), {}), tokenizer, **{"max_length": 512} | options)
