"""Next-token log-probabilities by plain transformers and PEFT: python run_transformers.py JOB.json, without qsvd."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def load(job: dict) -> torch.nn.Module:
    """Return the model of a job, with its adapter."""
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job.get("dtype", "float32")))
    if job.get("adapter") and job["adapter"] != job["model"]:  # transformers loads the adapter next to a model
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, job["adapter"])
    return model.eval()


def main(job: dict) -> None:
    """Write float32 [texts, tokens - 1, vocabulary] to the job's `out`."""
    model = load(job)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(job["tokens"])).logits[:, :-1].float()
    np.save(job["out"], logits.log_softmax(-1).numpy())


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
