"""Roles by hand, for families that `test_model` does not build."""

import pytest

from qsvd.plan.weights import role_of


@pytest.mark.parametrize(
    ("module", "role"),
    [
        ("transformer.layer.0.attention.q_lin", "q"),  # DistilBERT
        ("transformer.layer.0.attention.out_lin", "o"),
        ("transformer.layer.0.ffn.lin2", "down"),
        ("encoder.layer.3.attention.self.query_proj", "q"),  # DeBERTa
        ("decoder.block.0.layer.1.EncDecAttention.o", "o"),  # T5
        ("decoder.block.0.layer.2.DenseReluDense.wi_0", "gate"),
        ("decoder.block.0.layer.2.DenseReluDense.wo", "down"),
        ("transformer.h.0.self_attention.dense", "o"),  # BLOOM
        ("transformer.blocks.0.attn.Wqkv", "other"),  # MPT
        ("transformer.h.0.attn.c_proj", "o"),
        ("transformer.h.0.mlp.c_proj", "down"),
        ("model.layers.0.mlp.experts.3.w2", "down"),
        ("model.layers.0.mlp.gate", "other"),  # a router
        ("model.layers.0.dense", "other"),
    ],
)
def test_roles_of_further_families(module, role):
    assert role_of(module) == role
