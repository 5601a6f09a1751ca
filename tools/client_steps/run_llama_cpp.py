"""Next-token log-probabilities by llama.cpp: python run_llama_cpp.py JOB.json, with llama-cpp-python."""

import json
import sys
from pathlib import Path

import numpy as np
from llama_cpp import Llama


def main(job: dict) -> None:
    """Write float32 [texts, tokens - 1, vocabulary] to the job's `out`."""
    length = max(map(len, job["tokens"]))
    model = Llama(model_path=job["model"], n_ctx=length, n_batch=length, logits_all=True, verbose=False)
    texts = []
    for tokens in job["tokens"]:
        model.reset()
        model.eval(tokens)
        logits = np.array(model.scores[: len(tokens) - 1], dtype=np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        texts.append(logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))
    np.save(job["out"], np.array(texts, dtype=np.float32))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
