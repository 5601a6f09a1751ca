"""The planned bytes of the loss against TRL's own function, on the CPU."""

import pytest
import torch
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from qsvd.memory.training import COLUMNS, loss_bytes
from tests.memory.tracker import Tracker

NEAR = 0.02  # of the peak
CHUNK = 32768


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "hidden", "vocabulary"), [(129, 2048, 4000), (257, 64, 40_000), (65, 512, 32_768)])
def test_the_loss_takes_what_is_planned(tokens, hidden, vocabulary, dtype):
    states = torch.randn(tokens - 1, hidden).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, hidden).to(dtype)
    targets = torch.randint(vocabulary, (tokens - 1,))
    with Tracker() as tracker:
        outputs = ("log_probs", "entropy", "is_top1")
        log_probs, *_ = ChunkedLogProbFunction.apply(states, weight, None, targets, 1.0, CHUNK, None, 1.0, outputs)
        log_probs.sum().backward()
    planned = loss_bytes(tokens, 1, hidden, vocabulary, dtype=dtype, device="cpu")
    assert sum(planned) == pytest.approx(tracker.peak, rel=NEAR)
    assert COLUMNS == CHUNK


def test_a_gpu_needs_the_tile_and_the_gradient_twice():
    kept, peak = loss_bytes(5001, 1, 1024, 128_256, dtype=torch.bfloat16, device="cuda")
    assert peak == (4 + 2) * 5000 * 1024 + 4096 * CHUNK * 2  # exact, and rounded before the tile goes
    assert kept == 2 * 5000 * 1024 + 4 * 10 * 5000
