"""Tensors that weights have in common: LoRTA's parameters for all attentions, CoRA's basis for each kind of layer.

Shape suffixes: O = out features, I = in features, D = features of a head, K = trained rank.
"""

import dataclasses

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.func import functional_call

import qsvd
from qsvd.adapters.methods.families import said_of_frozen
from qsvd.adapters.methods.frozen import Frozen
from qsvd.adapters.model import split_linears, trained
from qsvd.adapters.start import Starts, new_record, planned_base
from qsvd.files.split_folder import open_split
from qsvd.numerics import svd
from qsvd.numerics.svd import shared_directions
from tests import reference
from tests.adapters.results import IDS, outputs, plain_model, split_checkpoint
from tests.commands.trained_runs import factors_of

RANK, ALPHA = 3, 6.0
WIDTH, HEADS, HEAD, LAYERS = 64, 4, 16, 2  # of the tiny Llama, whose keys and values have two heads
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NEAR = 1e-4  # of the largest number of a tensor: what float32 rounds in two layers


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return split_checkpoint(tmp_path_factory.mktemp("llama"))


def loaded(out, method, **own):
    return qsvd.load(out, options=qsvd.AdapterOptions(method, rank=RANK, alpha=ALPHA, own=own))


def moved(model, seed=0):
    with torch.no_grad():
        for number, parameter in enumerate(trained(model).values()):
            step = torch.from_numpy(reference.gaussian(1, parameter.numel(), seed=seed + number))
            parameter += 0.1 * step.reshape(parameter.shape)
    return model


def parts_of(model):
    return {name.rpartition(".")[2]: parameter for name, parameter in trained(model).items()}


def by_formula(parts, layer, projection, rows):
    """What LoRTA adds to a weight: a block of rows for each head."""
    number = PROJECTIONS.index(projection)
    blocks = []
    for head in range(rows // HEAD):
        inner = parts["heads"][head] * parts["matrices"][number] * parts["attentions"][layer]
        blocks.append(parts["up"] @ torch.diag(inner) @ parts["down"])
    return ALPHA / RANK * torch.cat(blocks)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "BertModel", "T5ForConditionalGeneration"])
def test_lortas_parameters_are_there_once_and_as_many_as_the_paper_counts(tmp_path, architecture):
    model = loaded(split_checkpoint(tmp_path, architecture), "lorta")
    attentions = 6 if architecture.startswith("T5") else LAYERS  # two encoder layers, two decoder layers with two each
    count = RANK * (WIDTH + WIDTH // HEADS + HEADS + 4 + attentions)
    assert sum(parameter.numel() for parameter in trained(model).values()) == count
    split = open_split(tmp_path / "out")
    plan = planned_base(split, new_record(split, qsvd.AdapterOptions("lorta", rank=RANK)), torch.float32)
    assert sum(tensor.numel for tensor in plan.parameters) == count
    members = [linear.adapter for _, linear in split_linears(model) if not isinstance(linear.adapter, Frozen)]
    assert len(members) == 4 * attentions
    for name in ("up", "down", "heads", "matrices", "attentions"):
        assert len({id(adapter.get_parameter(name)) for adapter in members}) == 1
    assert {(adapter.matrix, adapter.attention) for adapter in members} == {
        (matrix, attention) for matrix in range(4) for attention in range(attentions)
    }
    assert len([*split_linears(model)]) > len(members)


def test_lortas_gradients_are_autograds_of_the_dense_weights_in_float64(out):
    model = moved(loaded(out, "lorta")).train()
    logits = model(input_ids=IDS).logits
    weights = torch.from_numpy(reference.gaussian(logits.shape[0] * logits.shape[1], logits.shape[2], seed=9))
    (logits * weights.view_as(logits)).sum().backward()
    plain = plain_model(out)
    parts = {name: p.detach().double().requires_grad_() for name, p in parts_of(model).items()}
    dense = dict(plain.named_parameters())
    for layer in range(LAYERS):
        for projection in PROJECTIONS:
            name = f"model.layers.{layer}.self_attn.{projection}.weight"
            dense[name] = dense[name].detach() + by_formula(parts, layer, projection, len(dense[name]))
    exact = functional_call(plain, dense, kwargs={"input_ids": IDS}).logits
    (exact * weights.view_as(exact)).sum().backward()
    assert (logits - exact).abs().max() <= NEAR * exact.abs().max()
    for name, part in parts.items():
        found = parts_of(model)[name].grad.double()
        assert (found - part.grad).abs().max() <= NEAR * part.grad.abs().max(), name


@pytest.mark.parametrize("method", ["lorta", "cora"])
def test_what_is_common_is_saved_once_and_comes_back_for_all(out, tmp_path, method):
    model = moved(loaded(out, method))
    model.save_pretrained(tmp_path)
    names = {name.rpartition(".")[2]: 0 for name in safetensors.torch.load_file(tmp_path / "qsvd_adapter.safetensors")}
    for name in safetensors.torch.load_file(tmp_path / "qsvd_adapter.safetensors"):
        names[name.rpartition(".")[2]] += 1
    if method == "lorta":
        assert names == dict.fromkeys(("up", "down", "heads", "matrices", "attentions"), 1)
    else:
        assert names == {"down": 7 * LAYERS, "basis": 7}
    again = qsvd.load(out, adapter=tmp_path)
    assert torch.equal(outputs(again), outputs(model))
    assert not torch.equal(outputs(again), outputs(loaded(out, method)))
    again.save_pretrained(tmp_path / "again")
    first, second = (tmp_path / place / "qsvd_adapter.safetensors" for place in ("", "again"))
    assert first.read_bytes() == second.read_bytes()
    copy = model.reference()
    assert torch.equal(outputs(copy), outputs(model))
    assert len({id(parameter) for parameter in copy.parameters()}) == len({id(p) for p in model.parameters()})


def test_where_weights_are_started_in_another_order_they_start_alike(out):
    split = open_split(out)
    turned = dict(reversed(split.weights.items()))
    other = dataclasses.replace(split, manifest={**split.manifest, "weights": turned})
    for method in ("lorta", "cora"):
        record = new_record(split, qsvd.AdapterOptions(method, rank=RANK))
        first, second = (Starts(one, record, torch.device("cpu"), is_new=True) for one in (split, other))
        for module, family in first.assigned.families.items():
            assert second.assigned.families[module] == family
            for name, tensor in second.in_common.of(module).items():
                assert torch.equal(tensor, first.in_common.of(module)[name])


def test_coras_basis_has_the_leading_directions_of_all_layers_of_a_kind(out):
    model, stored = loaded(out, "cora"), factors_of(out)
    for end in ("self_attn.q_proj", "mlp.down_proj"):
        products = [stored[f"model.layers.{layer}.{end}"] for layer in range(LAYERS)]
        left = np.linalg.svd(np.concatenate([up @ down for up, down in products], axis=1))[0][:, :RANK]
        bases = [dict(split_linears(model))[f"model.layers.{layer}.{end}"].adapter.basis for layer in range(LAYERS)]
        assert bases[0] is bases[1]
        basis = bases[0].double().numpy()
        np.testing.assert_allclose(basis @ basis.T, left @ left.T, atol=0.02)  # bfloat16 rounds within 2^-8 each
        assert bases[0].dtype == torch.bfloat16
        assert (basis[np.abs(basis).argmax(axis=0), range(RANK)] > 0).all()


def test_coras_trained_bases_start_as_the_common_one_and_move_apart(out):
    frozen, model = loaded(out, "cora"), loaded(out, "cora", train_basis=True)
    adapters = [linear.adapter for path, linear in split_linears(model) if path.endswith("q_proj")]
    basis = next(linear.adapter.basis for path, linear in split_linears(frozen) if path.endswith("q_proj"))
    assert torch.equal(adapters[0].up, basis.float())
    assert torch.equal(adapters[1].up, basis.float())
    assert adapters[0].up is not adapters[1].up
    assert len(trained(model)) == 2 * 7 * LAYERS
    assert "basis" not in adapters[0].state_dict()


@pytest.mark.parametrize("sizes", [(40, (6, 5)), (300, (6, 5)), (20, (6, 0, 30)), (300, (280, 270))])
def test_shared_directions_are_those_of_the_products_side_by_side(sizes):
    rows, ranks = sizes
    factors = [
        (torch.from_numpy(reference.gaussian(rows, rank, seed=2 * n)) * torch.logspace(0, -2, rank),
         torch.from_numpy(reference.gaussian(rank, 50, seed=2 * n + 1)))
        for n, rank in enumerate(ranks)
    ]  # fmt: skip
    whole = np.concatenate([up.double().numpy() @ down.double().numpy() for up, down in factors], axis=1)
    left = np.linalg.svd(whole)[0][:, :4]
    found = shared_directions(factors, 4).double().numpy()
    np.testing.assert_allclose(found.T @ found, np.eye(4), atol=1e-5)
    np.testing.assert_allclose(found @ found.T, left @ left.T, atol=1e-4)


def test_many_shared_directions_of_large_layers_are_found_by_a_sketch(monkeypatch):
    monkeypatch.setattr(svd, "SMALL", 0)
    factors = [(torch.from_numpy(reference.decaying(200, 60, power=1.0, seed=n)), torch.eye(60)) for n in range(3)]
    left = np.linalg.svd(np.concatenate([up.double().numpy() for up, _ in factors], axis=1))[0][:, :8]
    found = shared_directions(factors, 8).double().numpy()
    np.testing.assert_allclose(found @ found.T, left @ left.T, atol=1e-3)


@pytest.mark.parametrize("architecture", ["Phi3ForCausalLM", "GPTNeoXForCausalLM"])
def test_lorta_refuses_a_model_without_separate_projections(tmp_path, architecture):
    out = split_checkpoint(tmp_path, architecture)
    with pytest.raises(ValueError, match=r"lorta trains separate query, .* holds several of them"):
        loaded(out, "lorta")


def test_lorta_refuses_layers_outside_of_attention(out):
    with pytest.raises(ValueError, match=r"there are none among the layers to train: use --method lora"):
        qsvd.load(out, options=qsvd.AdapterOptions("lorta", target_modules=("down_proj",)))


def test_what_lorta_leaves_frozen_is_said(out):
    split = open_split(out)
    plan, other = (
        planned_base(split, new_record(split, qsvd.AdapterOptions(method, rank=RANK)), torch.float32)
        for method in ("lorta", "cora")
    )
    assert [*said_of_frozen(plan)] == ["Layers: lorta trains 8 of 14; gate_proj, up_proj, down_proj stay frozen"]
    assert [*said_of_frozen(other)] == []


def test_cora_trains_the_kinds_that_have_components_and_refuses_none(out, tmp_path):
    split = open_split(out)
    weights = {n: w | {"rank": 0} if "up_proj" in n else w for n, w in split.weights.items()}
    mixed = dataclasses.replace(split, manifest={**split.manifest, "weights": weights})
    starts = Starts(mixed, new_record(mixed, qsvd.AdapterOptions("cora")), torch.device("cpu"))
    frozen = {module for module, kind in starts.assigned.kinds.items() if kind is Frozen}
    assert frozen == {w["module"] for n, w in weights.items() if "up_proj" in n}
    assert {family.directions for family in starts.assigned.families.values()} == {2 * 4}
    bare = split_checkpoint(tmp_path, rank=0)
    with pytest.raises(ValueError, match=r"cora takes its bases from the stored components, and the layers to train"):
        loaded(bare, "cora")
