"""Classifiers: a new head beside a split body, drawn as transformers draws it, trained and saved in full."""

import copy

import pytest
import scipy.stats
import torch
import transformers

import qsvd
from qsvd.adapters.linear import SplitLinear
from qsvd.adapters.model import trained
from tests.adapters.results import IDS, ROUNDINGS, distance, modules_of, outputs, plain_model, split_checkpoint

LABELS = ("no", "maybe", "yes")
HEADS = {  # of the checkpoint -> the classifier, and what of it no file has
    "BertModel": ("BertForSequenceClassification", {"classifier.weight": (3, 64), "classifier.bias": (3,)}),
    "LlamaForCausalLM": ("LlamaForSequenceClassification", {"score.weight": (3, 64)}),
    "RobertaForMaskedLM": (
        "RobertaForSequenceClassification",
        {"classifier.dense.weight": (64, 64), "classifier.dense.bias": (64,)}
        | {"classifier.out_proj.weight": (3, 64), "classifier.out_proj.bias": (3,)},
    ),
}


@pytest.fixture(scope="module", params=sorted(HEADS))
def out(request, tmp_path_factory):
    return split_checkpoint(tmp_path_factory.mktemp("result"), request.param)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    """One whose head has two layers with biases."""
    return split_checkpoint(tmp_path_factory.mktemp("result"), "RobertaForMaskedLM")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return split_checkpoint(tmp_path_factory.mktemp("result"))


def family(out):
    return qsvd.load(out).__class__.__name__


def head_of(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad and ".adapter." not in name}


def plain_classifier(out, model):
    """transformers' classifier in float64 with the body of `plain_model` and the head of ours."""
    body = plain_model(out)
    plain = getattr(transformers, HEADS[type(body).__name__][0])(copy.deepcopy(model.config)).double().eval()
    states = body.state_dict() | {name: p.detach().double() for name, p in head_of(model).items()}
    prefix = f"{plain.base_model_prefix}."
    if not any(name.startswith(prefix) for name in states):
        states = {name if name in head_of(model) else prefix + name: tensor for name, tensor in states.items()}
    missing, _ = plain.load_state_dict(states, strict=False)
    assert not missing
    return plain


def test_the_scores_are_those_of_the_plain_classifier(out):
    model = qsvd.load(out, labels=LABELS)
    kind, head = HEADS[family(out)]
    assert type(model).__name__ == kind
    assert {name: tuple(p.shape) for name, p in head_of(model).items()} == head
    assert outputs(model).shape == (2, 3)
    exact = outputs(plain_classifier(out, model))
    rounding = ROUNDINGS * distance(outputs(plain_classifier(out, model).float()), exact)
    assert distance(outputs(model), exact) <= rounding
    assert exact.abs().max() > 100 * rounding


def test_labels_are_in_the_config_and_head_and_adapters_are_all_that_is_trained(out):
    model = qsvd.load(out, labels=LABELS)
    assert model.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    assert model.config.label2id == {"no": 0, "maybe": 1, "yes": 2}
    assert (model.config.num_labels, model.config.problem_type) == (3, "single_label_classification")
    prefix = "" if family(out) != "BertModel" else "bert."
    adapters = {f"{prefix}{path}.{factor}" for path in modules_of(out) for factor in ("up", "down")}
    assert set(trained(model)) == adapters | set(HEADS[family(out)][1])
    assert model.split_record.full == tuple(HEADS[family(out)][1])


def test_the_head_is_drawn_as_transformers_draws_it(tmp_path):
    """Normal with the config's deviation, biases zero."""
    out = split_checkpoint(tmp_path, "RobertaForMaskedLM", initializer_range=0.3)
    head = head_of(qsvd.load(out, labels=LABELS))
    weights = torch.cat([p.detach().flatten() for name, p in head.items() if name.endswith("weight")])
    assert scipy.stats.kstest(weights.numpy() / 0.3, "norm").pvalue > 1e-3
    assert all((p == 0).all() for name, p in head.items() if name.endswith("bias"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_is_float32_beside_any_body(roberta, dtype):
    model = qsvd.load(roberta, labels=LABELS, dtype=dtype)
    assert {p.dtype for p in head_of(model).values()} == {torch.float32}
    scores = model(input_ids=IDS).logits
    assert scores.dtype == torch.float32
    model(input_ids=IDS, labels=torch.tensor([0, 2])).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in head_of(model).values())
    embedding = model.get_input_embeddings().weight
    assert (embedding.dtype, embedding.requires_grad) == (dtype, False)


def test_the_head_repeats_with_its_seed_and_leaves_torchs_generator_alone(roberta):
    before = torch.get_rng_state()
    first, again, other = (
        head_of(qsvd.load(roberta, labels=LABELS, options=qsvd.AdapterOptions(seed=seed))) for seed in (4, 4, 5)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if name.endswith("weight"))


def test_a_trained_head_is_saved_and_comes_back(roberta, tmp_path):
    model = qsvd.load(roberta, labels=LABELS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(input_ids=IDS, labels=torch.tensor([0, 2])).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "run")
    again = qsvd.load(roberta, adapter=tmp_path / "run")
    assert again.config.id2label == model.config.id2label
    ours, theirs = trained(model), trained(again)
    assert set(ours) == set(theirs) > set(HEADS[family(roberta)][1])
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(outputs(model), outputs(again))


def test_a_reference_has_a_head_of_its_own(roberta):
    model = qsvd.load(roberta, labels=LABELS)
    reference, before = model.reference(), outputs(model)
    with torch.no_grad():
        for parameter in head_of(model).values():
            parameter.add_(1)
    assert torch.equal(outputs(reference), before)
    assert not head_of(reference)


def test_a_llama_reads_the_last_token_before_the_padding(llama):
    model = qsvd.load(llama, labels=LABELS)
    pad = model.config.pad_token_id
    assert pad == model.config.eos_token_id == 2, "none is given, so the end of a text"
    short = IDS[:, :9]
    padded = torch.cat((short, torch.full((2, 5), pad)), dim=1)
    assert torch.allclose(outputs_of(model, padded), outputs_of(model, short), rtol=0, atol=1e-6)
    assert not torch.allclose(outputs_of(model, IDS), outputs_of(model, short), rtol=0, atol=1e-3)


def outputs_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_a_pad_token_of_the_config_stays(tmp_path):
    out = split_checkpoint(tmp_path, pad_token_id=7, eos_token_id=[5, 6])
    assert qsvd.load(out, labels=LABELS).config.pad_token_id == 7


def test_the_first_of_several_end_tokens_pads(tmp_path):
    out = split_checkpoint(tmp_path, eos_token_id=[5, 6])
    assert qsvd.load(out, labels=LABELS).config.pad_token_id == 5


def test_the_body_is_split_where_it_was(out):
    model = qsvd.load(out, labels=LABELS)
    prefix = "" if family(out) != "BertModel" else "bert."
    split = {path for path, module in model.named_modules() if isinstance(module, SplitLinear)}
    assert split == {f"{prefix}{path}" for path in modules_of(out)}


def test_what_the_quantized_class_lacks_before_the_head_is_new_and_trained_too(tmp_path):
    """A BERT trained on masks alone has no pooler."""
    model = qsvd.load(split_checkpoint(tmp_path, "BertForMaskedLM"), labels=LABELS)
    whole = {name for name, p in model.named_parameters() if p.requires_grad and ".adapter." not in name}
    assert whole == {f"{path}.{part}" for path in ("bert.pooler.dense", "classifier") for part in ("weight", "bias")}
    assert not any(p.is_meta for p in model.parameters())


def test_one_label_is_refused(llama):
    with pytest.raises(ValueError, match="labels has the one class 'yes'; a classifier needs at least two"):
        qsvd.load(llama, labels=("yes",))


def test_a_type_of_model_without_a_classifier_is_refused(tmp_path):
    out = split_checkpoint(tmp_path, "MusicgenForCausalLM")
    said = "transformers has no sequence classifier of model type 'musicgen_decoder'"
    with pytest.raises(ValueError, match=said):
        qsvd.load(out, labels=LABELS)
