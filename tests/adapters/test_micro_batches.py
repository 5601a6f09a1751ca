"""A block that computes some rows at a time, against the same block on the whole batch."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from qsvd.adapters.model import in_micro_batches
from tests.checkpoints import FAMILIES, tiny_model

ROUNDOFF = 64 * 2.0**-24  # of a float32 gradient relative to its largest element; measured: 10
TOTAL = 5  # rows of a batch
MODELS = {
    "BertForMaskedLM": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "Gemma3ForCausalLM": {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
    "Qwen3ForCausalLM": {},
    "Phi3ForCausalLM": {},
    "GPTNeoXForCausalLM": {},
    "T5ForConditionalGeneration": {"dropout_rate": 0.0, "decoder_start_token_id": 0},  # its blocks return tuples
}
GEMMA_3 = ("Gemma3TextConfig", FAMILIES["GemmaForCausalLM"][1])
checkpointed = partial(checkpoint, use_reentrant=False)


def inputs(architecture, tokens, *, padded):
    ids = torch.randint(3, 96, (TOTAL, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 5:] = 0
        mask[4, 2:] = 0
    more = {"decoder_input_ids": ids[:, :4]} if architecture.startswith("T5") else {}
    return {"input_ids": ids, "attention_mask": mask} | more


def gradients(model, given, function):
    """Of a sum over all outputs, by parameter."""
    model.zero_grad()
    model._set_gradient_checkpointing(True, function)
    logits = model(**given, use_cache=False).logits if model.can_generate() else model(**given).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("rows", "tokens", "padded"), [(1, 8, True), (3, 8, False), (2, TOTAL, True)])
@pytest.mark.parametrize("architecture", MODELS)
def test_gradients_are_those_of_the_whole_batch(architecture, rows, tokens, padded, monkeypatch):
    monkeypatch.setitem(FAMILIES, "Gemma3ForCausalLM", GEMMA_3)
    model = tiny_model(architecture, **MODELS[architecture]).train()
    given = inputs(architecture, tokens, padded=padded)
    whole = gradients(model, given, checkpointed)
    seen = []

    def noted(block, *positional):
        seen.append(len(positional[0]))
        return checkpointed(block, *positional)

    parts = gradients(model, given, partial(in_micro_batches, rows, noted))
    blocks = 4 if architecture.startswith("T5") else 2
    assert seen == blocks * [min(rows, TOTAL - start) for start in range(0, TOTAL, rows)]
    assert parts.keys() == whole.keys()
    largest = max(gradient.abs().max().item() for gradient in whole.values())
    for name, gradient in whole.items():
        assert (parts[name] - gradient).abs().max().item() <= ROUNDOFF * largest, name


def plain(block, *inputs):
    return block(*inputs)


def test_what_has_the_rows_of_the_batch_is_divided_and_all_else_is_given_to_every_part():
    rows = torch.arange(TOTAL)
    hidden, mask = rows.reshape(TOTAL, 1, 1).expand(TOTAL, 7, 4), rows.reshape(TOTAL, 1, 1, 1)
    shared = {"causal": torch.zeros(1, 1, 7, 7), "scale": torch.tensor(2.0), "nothing": None, "flag": True}
    seen = []

    def block(name, hidden, mask, *, position_embeddings, **others):
        assert (name, others) == ("itself", shared)
        both, once = position_embeddings
        seen.append((hidden[:, 0, 0].tolist(), mask.flatten().tolist(), both.flatten().tolist(), len(once)))
        return hidden * 2, (mask, None)

    bound = partial(block, "itself", position_embeddings=(rows.reshape(TOTAL, 1), torch.zeros(1, 7)), **shared)
    doubled, (masks, nothing) = in_micro_batches(2, plain, bound, hidden, mask)
    assert seen == [(part, part, part, 1) for part in ([0, 1], [2, 3], [4])]
    assert torch.equal(doubled, 2 * hidden)
    assert torch.equal(masks, mask)
    assert nothing is None


@pytest.mark.parametrize("rows", [TOTAL, TOTAL + 1])
def test_a_batch_of_no_more_rows_goes_through_as_it_is(rows):
    hidden = torch.zeros(TOTAL, 7, 4)
    assert in_micro_batches(rows, plain, partial(lambda given: given), hidden) is hidden


@pytest.mark.parametrize(("rows", "expected"), [(1, TOTAL), (2, 1)])
def test_an_output_that_is_the_same_for_all_rows_stays_one(rows, expected):
    """T5's position bias [1, heads, tokens, tokens], which the next block takes; of parts of one row it is theirs."""
    bias = torch.randn(1, 2, 7, 7)
    _, found = in_micro_batches(rows, plain, partial(lambda given: (given, bias)), torch.zeros(TOTAL, 7, 4))
    assert torch.equal(found, bias.expand(expected, 2, 7, 7))
