"""Can a cheap copy of the output head find its largest outputs (HiRE, arXiv:2402.09360)? Measured on real models.

    python tools/head_scorer.py MODEL TEXT [MODEL TEXT ...]

A scorer reads fewer bytes than the head. A row is a candidate if its score and a bound of its error reach the best sure
score: |(w - s) x| <= ||w - s|| ||x||. The exact head is then read for the candidates alone. The table has, for each
scorer, how many rows are candidates, the bytes read over those of the head in 16 bits, the time of the scores of one
token over that of the head in float32, and without the bound how often the largest output is among the 8 highest.

Shape suffixes: V = rows of the head, D = hidden size, T = tokens.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from qsvd.adapters.linear import times_transposed
from qsvd.numerics.names import codec_named

TOKENS, WINDOW, FEW, CALLS = 2048, 256, 8, 31


@torch.no_grad()
def hidden_states(folder: str, text: Path) -> tuple[Tensor, Tensor]:
    """Return the head [V, D] and its inputs [T, D] on a text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(text.read_text(encoding="utf-8"), verbose=False).input_ids[:TOKENS]
    rows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
    found = model(rows, output_hidden_states=True).hidden_states[-1]
    return model.get_output_embeddings().weight.detach(), found.reshape(-1, found.shape[-1])


Score = Callable[[Tensor], Tensor]


def scorers(head_VD: Tensor) -> dict[str, tuple[Tensor, float, Score]]:
    """Return copies of the head by name, with the bytes and the product of each."""
    found = {}
    for name in ("nf8-64-8x256", "nf4-64-8x256"):
        packed = codec_named(name).encode(head_VD)
        found[f"{name} residual"] = packed.decode(), float(packed.num_bytes), partial(times_transposed, packed=packed)
    left, values, right = torch.linalg.svd(head_VD, full_matrices=False)
    for share in (2, 4):
        rank = head_VD.shape[1] // share
        up_VR, down_RD = left[:, :rank] * values[:rank], right[:rank]
        found[f"{rank} components"] = up_VR @ down_RD, 2.0 * rank * sum(head_VD.shape), partial(thin, up_VR, down_RD)
    return found


def thin(up_VR: Tensor, down_RD: Tensor, x_TD: Tensor) -> Tensor:
    """Return the scores of components."""
    return x_TD @ down_RD.T @ up_VR.T


def timed(call: Callable[[], Tensor]) -> float:
    """Return the median seconds of a call, after a warm-up."""
    call()
    seconds = []
    for _ in range(CALLS):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return median(seconds)


def main(folder: str, text: Path) -> None:
    """Print a row for each scorer of one model."""
    head_VD, x_TD = hidden_states(folder, text)
    top_T, lengths_T = (x_TD @ head_VD.T).argmax(dim=1), x_TD.norm(dim=1)
    whole, one = 2.0 * head_VD.numel(), timed(lambda: x_TD[:1] @ head_VD.T)
    for name, (scorer_VD, size, score) in scorers(head_VD).items():
        scores_TV = x_TD @ scorer_VD.T
        bounds_TV = lengths_T[:, None] * (head_VD - scorer_VD).norm(dim=1)
        sure_T = (scores_TV - bounds_TV).amax(dim=1)
        share = float((scores_TV + bounds_TV >= sure_T[:, None]).float().mean())
        recall = float((scores_TV.topk(FEW).indices == top_T[:, None]).any(dim=1).float().mean())
        ratio = timed(partial(score, x_TD[:1])) / one
        cells = (f"{share:.1%}", f"{size / whole + share:.2f}", f"{ratio:.1f}", f"{recall:.2%}")
        print(f"| {' | '.join((Path(folder).name, str(len(head_VD)), name, *cells))} |")


if __name__ == "__main__":
    print("| model | rows | scorer | candidates | bytes | time | recall of 8 |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: |")
    for number in range(1, len(sys.argv), 2):
        main(sys.argv[number], Path(sys.argv[number + 1]))
