"""What the tests of `qsvd calibrate` start from: a language model, a classifier, a few texts."""

import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch
import transformers

from qsvd.options import Calibrate
from tests.checkpoints import COMMON
from tests.commands.folders import shared_model

TEXTS = ("Once upon a time there was a cat.", "The dog ran to the big tree.", "Tom and Lily like to play.", "She sat.")


def stories():
    """A small model that was really trained."""
    return shared_model("stories260K")


@cache
def texts():
    """The file of the texts."""
    return write_rows(Path(mkdtemp()) / "t.jsonl", [{"text": text} for text in TEXTS])


@cache
def classifier():
    """A random BERT with the tokenizer of a real one, and names for its classes."""
    folder, source = Path(mkdtemp()), shared_model("minilm-l6")
    config = transformers.BertConfig(**(COMMON | {"vocab_size": 30522}), id2label={0: "bad", 1: "good"})
    config.architectures = ["BertForSequenceClassification"]
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    for path in source.glob("*token*"):
        shutil.copyfile(path, folder / path.name)
    return folder


def write_rows(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def options_of(model, data, out, **changes):
    return Calibrate(str(model), str(data), out=out, **({"examples": 4, "device": "cpu"} | changes))
