"""Every family is counted whole, from its config alone."""

from itertools import product

import pytest
import torch
import transformers

from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.start import planned
from qsvd.memory import block_bytes
from qsvd.memory.block_bytes import Batch, run_blocks
from qsvd.memory.items import EVERYTHING, Limits
from qsvd.memory.other_tasks import cache_bytes
from qsvd.memory.placement import FREE, ways
from qsvd.memory.split_model import skeleton
from qsvd.memory.training import Training, plan_training
from qsvd.numerics.nf4 import NormalFloat4
from qsvd.plan.allocation import Choice, uniform
from qsvd.plan.weights import plan_model, unsplittable
from tests.checkpoints import FAMILIES, GROUPED, tiny_config

GEMMAS = {
    "Gemma2ForCausalLM": ("Gemma2Config", GROUPED | {"head_dim": 8}),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", GROUPED | {"head_dim": 8}),
    "Qwen3MoeForCausalLM": (
        "Qwen3MoeConfig",
        GROUPED | {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2},
    ),
}
MAMBA = ("MambaConfig", {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 1, "vocab_size": 96})
OTHERS = GEMMAS | {"MambaForCausalLM": MAMBA}
NAMES = [
    *("LlamaForCausalLM", "Qwen3ForCausalLM", "GemmaForCausalLM"),
    *("Phi3ForCausalLM", "GPTNeoXForCausalLM", "BertForMaskedLM", "MixtralForCausalLM", *GEMMAS),
]
EAGER = {"Gemma2ForCausalLM"}


def config_of(name):
    if name in FAMILIES:
        return tiny_config(name)
    kind, options = OTHERS[name]
    config = getattr(transformers, kind)(**options)
    config.architectures = [name]
    return config


def planned_family(name, rank=4, exclude=()):
    config = config_of(name)
    names = plan_model(config, exclude=[*unsplittable(config), *exclude])
    same = uniform(names.weights, Choice(NormalFloat4(double_quant=False), rank))
    return planned(skeleton(config, torch.bfloat16), names, same, options=AdapterOptions())


@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_a_family_is_split_or_counted_in_16_bits(name):
    model = planned_family(name)
    real = getattr(transformers, name)(config_of(name))
    assert model.elements + (model.dense.total - model.skeleton.buffers) // 2 == sum(
        tensor.numel() for tensor in real.parameters()
    )
    assert model.dense.embeddings == 2 * real.get_input_embeddings().weight.numel()
    is_tied = real.get_output_embeddings().weight is real.get_input_embeddings().weight
    assert model.is_tied == is_tied
    assert (model.dense.head == 0) == is_tied


@pytest.mark.parametrize(
    ("name", "is_masked"),
    [*product(("LlamaForCausalLM", *EAGER, "BertForMaskedLM"), (False, True)), ("MixtralForCausalLM", False)],
)
def test_a_family_needs_more_for_more_tokens_and_less_with_checkpoints(name, is_masked):
    def blocks(tokens, *, checkpointing=True):
        return run_blocks(model, Batch(tokens, 1, is_masked, checkpointing, "cuda"), "first")

    model = planned_family(name)
    once, twice, whole = blocks(64), blocks(128), blocks(64, checkpointing=False)
    assert len(once) == len(model.blocks) == 2
    assert once[0].input == once[0].kept == 64 * 64 * 2
    assert twice[0].backward.total > once[0].backward.total
    assert whole[0].kept > once[0].kept
    grows_quadratically = twice[0].backward.total > 3 * once[0].backward.total
    assert model.skeleton.has_fused_attention == (name not in EAGER)
    assert grows_quadratically <= (name in EAGER or is_masked)


def test_experts_that_are_excluded_are_counted_in_16_bits_and_it_is_said():
    model = planned_family("MixtralForCausalLM", exclude=["*.experts.*"])
    assert model.dense.experts == 2 * 2 * 4 * 3 * 64 * 128  # bytes, blocks, experts, matrices
    run = Training(Batch(16, 1, is_masked=False, checkpointing=True, device="cuda"), 1, "adamw")
    plan = plan_training(model, run, EVERYTHING, Limits())
    assert plan["experts in 16 bits"].gpu == model.dense.experts
    assert any("Experts that are not quantized" in note for note in plan.notes)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", *EAGER])
def test_it_is_said_that_all_scores_of_an_attention_are_held(name):
    run = Training(Batch(16, 1, is_masked=False, checkpointing=True, device="cuda"), 1, "adamw")
    notes = plan_training(planned_family(name), run, EVERYTHING, Limits()).notes
    assert any("with eager attention" in note for note in notes) == (name in EAGER)


def test_a_block_that_loops_over_tokens_is_run_with_few_and_takes_what_all_take(monkeypatch):
    monkeypatch.setattr(block_bytes, "STRETCH", 4)
    batch = Batch(26, 2, is_masked=False, checkpointing=True, device="cpu")
    stretched, run = run_blocks(planned_family("MambaForCausalLM"), batch, "first"), []
    counted = block_bytes._run_counted
    monkeypatch.setattr(block_bytes, "_loops", lambda _: False)
    monkeypatch.setattr(block_bytes, "_run_counted", lambda *given: run.append(given[2].tokens) or counted(*given))
    assert stretched == run_blocks(planned_family("MambaForCausalLM"), batch, "first")
    assert run == [26]
    square = [7 + 5 * times + 3 * times**2 for times in (1, 2, 3, 6.5)]  # of an attention in such a block
    assert block_bytes._stretched(square[:3], 6.5) == round(square[3])


@pytest.mark.parametrize(
    ("name", "blocks", "tokens"),
    [("T5ForConditionalGeneration", 4, 16), ("ViTModel", 2, (32 // 16) ** 2 + 1), ("GPT2LMHeadModel", 2, 16)],
)
def test_encoders_decoders_and_images_run_by_what_they_read(name, blocks, tokens):
    """An image of 32 x 32 is 4 patches of 16 x 16 and one token for the class."""
    model = planned_family(name)
    found = run_blocks(model, Batch(16, 3, is_masked=False, checkpointing=True, device="cuda"), "first")
    assert len(found) == blocks
    assert {block.input for block in found} == {3 * tokens * 64 * model.dtype.itemsize}


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma3ForCausalLM", "GPTNeoXForCausalLM"])
def test_keys_and_values_are_those_of_a_real_cache(name):
    model = planned_family(name)
    real = getattr(transformers, name)(config_of(name)).bfloat16()
    tokens = torch.zeros(3, 20, dtype=torch.long)
    cache = real(input_ids=tokens, use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(model, Batch(20, 3, is_masked=False, checkpointing=True, device="cuda")) == held


def test_a_state_that_does_not_grow_is_no_cache():
    batch = Batch(20, 3, is_masked=False, checkpointing=True, device="cuda")
    assert cache_bytes(planned_family("MambaForCausalLM"), batch) == 0


def test_a_block_that_cannot_be_run_is_refused():
    kind, options = GEMMAS["Qwen3MoeForCausalLM"]
    config = getattr(transformers, kind)(**(options | {"num_experts_per_tok": 8}))  # of 4
    names = plan_model(config, exclude=unsplittable(config))
    same = uniform(names.weights, Choice(NormalFloat4(double_quant=True), 4))
    model = planned(skeleton(config, torch.bfloat16), names, same, options=AdapterOptions())
    with pytest.raises(ValueError, match=r"model\.layers\.0 of Qwen3MoeForCausalLM cannot be run on its own"):
        run_blocks(model, Batch(16, 1, is_masked=False, checkpointing=True, device="cuda"), "first")


def test_the_optimizer_must_be_known():
    run = Training(Batch(16, 1, is_masked=False, checkpointing=True, device="cuda"), 1, "lion")
    with pytest.raises(ValueError, match="optimizer 'lion' is not one of adamw, adamw_8bit"):
        plan_training(planned_family("LlamaForCausalLM"), run, EVERYTHING, Limits())


def test_methods_that_train_components_need_some():
    config = config_of("LlamaForCausalLM")
    names = plan_model(config)
    plain = uniform(names.weights, Choice(NormalFloat4(double_quant=True), 0))
    with pytest.raises(
        ValueError, match=r"edora trains stored components, and the quantized model has none \(rank 0\)"
    ):
        planned(skeleton(config, torch.float32), names, plain, options=AdapterOptions("edora"))


@pytest.mark.parametrize(("name", "may_move"), [("LlamaForCausalLM", True), ("GemmaForCausalLM", False)])
def test_embeddings_that_are_the_head_too_are_on_the_gpu(name, may_move):
    assert {way.embeddings_on_host for way in ways(planned_family(name), "cuda", FREE)} == {may_move}
    assert not any(way.embeddings_on_host for way in ways(planned_family(name), "cpu", FREE))


def test_experts_before_a_block_are_not_run():
    """Their choice depends on numbers, which the meta device has not."""
    options = {"layer_types": ["linear_attention", "full_attention"], "num_experts": 4, "num_experts_per_tok": 2}
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.Qwen3_5MoeTextConfig(
        **(options | heads | sizes), linear_value_head_dim=16, head_dim=16, vocab_size=96, moe_intermediate_size=64,
        shared_expert_intermediate_size=64, architectures=["Qwen3_5MoeForCausalLM"],
    )  # fmt: skip
    names = plan_model(config)
    codec = NormalFloat4(double_quant=True)
    model = planned(
        skeleton(config, torch.float32), names, uniform(names.weights, Choice(codec, 4)), options=AdapterOptions()
    )
    found = run_blocks(model, Batch(16, 1, is_masked=False, checkpointing=True, device="cpu"), "first")
    assert len(found) == 2
