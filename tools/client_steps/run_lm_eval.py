"""Log-likelihoods of given tokens by lm_eval's model class: python run_lm_eval.py JOB.json; one number a text."""

import json
import sys
from pathlib import Path

import numpy as np
from lm_eval.models.huggingface import HFLM


def main(job: dict) -> None:
    """Write float32 [texts]: nats of all tokens after the first."""
    adapter = {} if job.get("adapter") in (None, job["model"]) else {"peft": job["adapter"]}
    model = HFLM(pretrained=job["model"], device="cpu", dtype=job.get("dtype", "float32"), batch_size=1, **adapter)
    requests = [(("", ""), tokens[:1], tokens[1:]) for tokens in job["tokens"]]
    found = model._loglikelihood_tokens(requests, disable_tqdm=True)
    np.save(job["out"], np.array([value for value, _ in found], dtype=np.float32))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
