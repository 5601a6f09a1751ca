"""lm-eval measures the quantized model and a run whole, not the residual alone. Needs the package lm_eval."""

import json
import math
import shutil
import subprocess

import pytest
import torch
from transformers import AutoTokenizer

import qsvd
from qsvd.cli import run
from tests.runs import TEXTS, language_base

pytestmark = pytest.mark.slow
TASK = """task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}]
"""


def bits_per_byte(arguments, folder):
    """What lm_eval prints for the texts."""
    command = ["lm_eval", "--model", "hf", "--model_args", arguments, "--tasks", "mine", "--include_path", str(folder)]
    command += ["--device", "cpu", "--batch_size", "1", "--output_path", str(folder / "results")]
    subprocess.run(command, check=True, capture_output=True, text=True)
    found = max((folder / "results").rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(found.read_text())["results"]["mine"]["bits_per_byte,none"]


def expected(model, tokenizer):
    """By definition, over all tokens of the tokenizer; lm-eval sets one more beginning of a text before them."""
    nats = 0.0
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        tokens = torch.tensor([[tokenizer.bos_token_id, *ids]])
        with torch.no_grad():
            nats += model(input_ids=tokens, labels=tokens).loss.item() * len(ids)
    return nats / math.log(2) / sum(len(text.encode()) for text in TEXTS)


@pytest.mark.skipif(shutil.which("lm_eval") is None, reason="lm_eval is not installed")
def test_lm_eval_measures_a_quantized_model_and_a_run_whole(tmp_path):
    out = language_base(tmp_path)
    model = qsvd.load(out, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(out)
    (tmp_path / "data.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in TEXTS))
    (tmp_path / "mine.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    whole = f"pretrained={out},dtype=float32"
    start = expected(model, tokenizer)
    assert bits_per_byte(whole, tmp_path) == pytest.approx(start, rel=5e-3)  # bitsandbytes: bfloat16 on some CPUs
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data *= 1.2
    model.save_pretrained(tmp_path / "run")
    peft = tmp_path / "run-peft"
    assert run(["export", str(tmp_path / "run"), "--to", "peft", "--out", str(peft), "--no-check"]) == 0
    assert abs(expected(model, tokenizer) / start - 1) > 2e-2
    trained = bits_per_byte(f"{whole},peft={peft}", tmp_path)
    assert trained == pytest.approx(expected(model, tokenizer), rel=5e-3)
