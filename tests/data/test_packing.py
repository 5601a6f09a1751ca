"""Packed rows against TRL's packing, and against plain transformers with one sequence at a time, in float64."""

import datasets
import pytest
import torch
import trl
from hypothesis import given
from hypothesis import strategies as st

from qsvd.data.columns import UNTRAINED, Tokenized
from qsvd.data.row_files import Places
from qsvd.data.tokens import check_keeps_apart, count_packed, pack, packed_batch, packed_dataset
from qsvd.errors import BadInput
from qsvd.plan.language import why_mixed
from tests.checkpoints import tiny_config, tiny_model

ROUNDOFF = 1e-12  # of a float64 gradient relative to its largest element; measured: 9e-16, and 0.8 and more if mixed
LENGTHS = (9, 17, 14, 30, 2, 5)
SLIDING = {"sliding_window": 6}  # less than a sequence
KEEPING = ("LlamaForCausalLM", "MistralForCausalLM", "GPT2LMHeadModel", "MixtralForCausalLM")
MIXING = ("GptOssForCausalLM", "OPTForCausalLM", "FalconForCausalLM")


@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=60), row_length=st.integers(40, 90))
def test_rows_are_those_of_trl(lengths, row_length):
    rows = datasets.Dataset.from_dict({"input_ids": [[1] * length for length in lengths]})
    theirs = trl.pack_dataset(rows, row_length, map_kwargs={"load_from_cache_file": False, "keep_in_memory": True})
    ours = pack(lengths, row_length)
    assert [[lengths[index] for index in row] for row in ours] == theirs["seq_lengths"]
    assert sorted(index for row in ours for index in row) == list(range(len(lengths)))


def examples():
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 90, (length,), generator=generator).tolist() for length in LENGTHS]
    labels = [[UNTRAINED, *row[1:]] if number % 2 else row for number, row in enumerate(ids)]
    return Tokenized("text", ids, labels, Places("rows", "row", []))


def summed(model, batch):
    """The loss of all trained tokens, in nats, and its gradients."""
    labels = batch.pop("labels")
    chances = model(**batch, use_cache=False).logits[:, :-1].log_softmax(-1)
    wanted = labels[:, 1:]
    chosen = chances.gather(-1, wanted.clamp(min=0)[..., None])[..., 0]
    loss = -chosen[wanted != UNTRAINED].sum()
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("architecture", KEEPING + MIXING)
def test_loss_and_gradients_are_those_of_the_sequences_alone_or_the_family_is_refused(architecture):
    model = tiny_model(architecture, **(SLIDING if architecture == "MistralForCausalLM" else {})).double()
    data = examples()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others take no float64
    rows = pack(LENGTHS, 40)
    assert rows == [[3, 5, 4], [1, 2, 0]]
    batch = packed_batch(list(packed_dataset(data, rows)), padding=90)
    assert count_packed(batch["position_ids"]) == sum(LENGTHS) < batch["input_ids"].numel()
    loss, gradients = summed(model, batch)
    alone = [
        summed(model, {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])})
        for ids, labels in zip(data.input_ids, data.labels, strict=True)
    ]
    expected = sum(one for one, _ in alone)
    errors = [
        float((found - sum(parts)).abs().max() / sum(parts).abs().max().clamp(min=1e-9))
        for found, *parts in zip(gradients, *(of for _, of in alone), strict=True)
    ]
    is_same = max(*errors, float((loss - expected).abs() / expected)) <= ROUNDOFF
    assert is_same == (why_mixed(model.config) is None) == (architecture in KEEPING)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (tiny_config("OPTForCausalLM"), "opt lets tokens see the sequences before theirs in a row"),
        (tiny_config("Qwen3_5MoeForCausalLM", layer_types=["linear_attention", "full_attention"]), "with a state that"),
    ],
)
def test_a_family_that_mixes_sequences_is_refused(tmp_path, config, reason):
    config.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=f"^--packing cannot be used for MODEL: .*{reason}.*; leave it out$"):
        check_keeps_apart(tmp_path, "MODEL")
