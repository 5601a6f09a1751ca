"""The planned bytes of the loss against TRL's own function, and transformers' own of all logits, on the CPU."""

import pytest
import torch
import transformers
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

import qsvd
from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.start import new_record, planned_base
from qsvd.files.split_folder import open_split
from qsvd.memory.block_bytes import Batch
from qsvd.memory.training import COLUMNS, Training, loss_bytes, moments_of
from qsvd.training.settings import limit_tiles
from tests.drawn import drawn_base
from tests.memory.tracker import Tracker

NEAR = 0.02  # of the peak
CHUNK = 32768


@pytest.mark.parametrize(
    ("tokens", "hidden", "vocabulary", "dtype"),
    [
        (129, 2048, 4000, torch.float32),
        (129, 2048, 4000, torch.bfloat16),
        (257, 64, 40_000, torch.float32),
        (600, 64, 4000, torch.bfloat16),
        (65, 512, 32_768, torch.float32),
    ],
)
def test_the_loss_takes_what_is_planned(tokens, hidden, vocabulary, dtype):
    states = torch.randn(tokens - 1, hidden).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, hidden).to(dtype)
    targets = torch.randint(vocabulary, (tokens - 1,))
    limit_tiles(states.device)
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


SEQ2SEQ = {"vocab_size": 8192, "d_model": 128, "decoder_start_token_id": 0, "pad_token_id": 0}
HALVES = {
    "T5": SEQ2SEQ | {"d_ff": 256, "d_kv": 32, "num_layers": 2, "num_heads": 4},
    "Bart": SEQ2SEQ
    | {f"{half}_{name}": size for half in ("encoder", "decoder") for name, size in (("ffn_dim", 256), ("layers", 1))}
    | {"encoder_attention_heads": 4, "decoder_attention_heads": 4},
}


@pytest.mark.parametrize(
    ("family", "dtype", "dropout"),
    [("T5", torch.float32, 0.0), ("Bart", torch.bfloat16, 0.0), ("T5", torch.bfloat16, 0.1)],
)
def test_all_logits_of_an_encoder_decoder_are_planned(tmp_path, family, dtype, dropout):
    """With dropout in the attention, which makes torch keep all its matrices on a CPU: without checkpoints."""
    name, tokens = f"{family}ForConditionalGeneration", 160
    changes = {"dropout_rate": dropout} if family == "T5" else {}
    config = getattr(transformers, f"{family}Config")(**HALVES[family], **changes, architectures=[name])
    out = drawn_base(tmp_path / "out", config, 4)
    split, options = open_split(out), AdapterOptions("pissa")
    batch = Batch(tokens, 2, is_masked=True, checkpointing=not dropout, device="cpu")
    plan = planned_base(split, new_record(split, options), dtype)
    planned = max(moment.total for moment in moments_of(plan, Training(batch, 1, "adamw")))
    model = qsvd.load(out, options=options, device="cpu", dtype=dtype).train()
    if not dropout:
        model.activation_checkpointing_enable()
    ids, mask = torch.randint(5, 8192, (2, tokens)), torch.ones(2, tokens, dtype=torch.long)
    mask[1:, -3:] = 0
    with Tracker() as tracker:
        model(input_ids=ids, attention_mask=mask, labels=ids.clone()).loss.backward()
    assert tracker.peak <= planned <= 1.1 * tracker.peak
