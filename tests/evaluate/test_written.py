"""The loss of an encoder-decoder model against transformers' own, one example at a time."""

import pytest
import torch

from qsvd.evaluate.written import written_loss
from tests.checkpoints import tiny_model

EXAMPLES = (([5, 6, 7, 1], [8, 9, 1]), ([10, 1], [11, 12, 13, 14, 1]), ([20, 21, 22, 23, 24, 1], [2, 1]))


def test_it_is_the_mean_of_transformers_loss_over_all_target_tokens():
    model = tiny_model("T5ForConditionalGeneration", decoder_start_token_id=0, pad_token_id=0).eval()
    sources, targets = zip(*EXAMPLES, strict=True)
    found = written_loss(model, sources, targets, pad_token=0, batch=2)
    nats = 0.0
    with torch.no_grad():
        for source, target in EXAMPLES:
            loss = model(input_ids=torch.tensor([source]), labels=torch.tensor([target])).loss
            nats += loss.item() * len(target)
    assert found.tokens == 10
    assert found.nats == pytest.approx(nats / 10, abs=1e-5)


def test_a_missing_target_is_refused():
    model = tiny_model("T5ForConditionalGeneration", decoder_start_token_id=0, pad_token_id=0).eval()
    with pytest.raises(ValueError, match="2 sources have 1 targets"):
        written_loss(model, [[1], [2]], [[1]], pad_token=0)
