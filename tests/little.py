"""Little models that have learnt something, with the tokenizer of the embedded model, to run documented commands."""

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

from qsvd.commands.demo import HELD_OUT, MODEL

DENSE = {  # whose smallest weight has rank 128
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 4, "tie_word_embeddings": True,
}  # fmt: skip


def write_little(folder: Path, kind: str = "Llama", **options: Any) -> None:
    """Write a model of one of transformers' classes for text, and the tokenizer."""
    shutil.copytree(MODEL, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    config = getattr(transformers, f"{kind}Config")(
        **(DENSE | {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2} | options)
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    train_a_little(model, tokenizer)
    model.generation_config.max_new_tokens = 20
    model.to(torch.bfloat16).save_pretrained(folder)


def train_a_little(model: Any, tokenizer: Any) -> None:
    """Bring the loss below that of guessing, which `qsvd train` asks for."""
    ids = tokenizer(HELD_OUT.read_text(encoding="utf-8")[:4000], return_tensors="pt").input_ids[:, :512]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
