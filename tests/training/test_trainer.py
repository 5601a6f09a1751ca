"""A step of the trainers against plain transformers in float64, one sequence at a time."""

import json

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl.kernels import chunked_logprob

from qsvd.adapters.model import trained
from qsvd.data.columns import UNTRAINED
from qsvd.errors import TrainingStopped
from tests.adapters.results import plain_model
from tests.commands.folders import components_of
from tests.runs import RANK, sequences, settings, trainer

LOSS_ROUNDOFF = 8 * 2.0**-24  # measured: one
ROUNDOFF = 128 * 2.0**-24  # of a float32 gradient relative to its largest element; measured: 43
LEAST_8_BIT = 4096  # elements; bitsandbytes' min_8bit_size


class Keep:
    """Copies the gradients as they come from the backward pass."""

    @classmethod
    def after_backward(cls, model, step):
        assert step == 1
        cls.gradients = {name: p.grad.clone() for name, p in trained(model).items()}


def masked(*, all_trained):
    rows = sequences()
    return {"input_ids": rows["input_ids"], "labels": rows["input_ids"]} if all_trained else rows


def first_step(base, run, rows, **changes):
    """Loss and gradients of a run of one step."""
    made = trainer(base, run, rows, settings(**changes), Keep)
    made.train()
    return made.state.log_history[0]["loss"], made.watch.gradients


@pytest.fixture(scope="module")
def expected(language):
    """Mean loss of a trained token, and its gradients for the factors by the chain rule, in float64."""
    return {choice: by_definition(language, masked(all_trained=choice)) for choice in (True, False)}


def by_definition(base, rows):
    model = plain_model(base)
    weights = json.loads((base / "qsvd.json").read_text())["weights"]
    total, count = torch.zeros((), dtype=torch.float64), 0
    for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
        chances = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        places = [place for place, label in enumerate(labels[1:]) if label != UNTRAINED]
        total = total - sum(chances[place, labels[place + 1]] for place in places)
        count += len(places)
    dense = [model.get_parameter(name) for name in weights]
    gradients, factors = {}, components_of(base)
    for (name, weight), grad in zip(weights.items(), torch.autograd.grad(total / count, dense), strict=True):
        prefix = f"base_model.model.{weight['module']}.lora_"
        up, down = (factors[f"{prefix}{letter}.weight"].double() for letter in "BA")
        module = name.removesuffix(".weight")
        gradients |= {f"{module}.up": grad @ down.T, f"{module}.down": up.T @ grad}
    return total.item() / count, gradients


@pytest.mark.parametrize(
    ("changes", "all_trained"),
    [
        ({"gradient_checkpointing": True}, True),
        ({"batch_size": 1, "accumulate": 4}, False),
        ({"batch_size": 3, "accumulate": 2}, True),
        ({"batch_size": 1, "accumulate": 4, "layer_major": True, "gradient_checkpointing": True}, False),
        ({"batch_size": 3, "accumulate": 2, "layer_major": True, "gradient_checkpointing": True}, True),
        ({"packing": True}, False),
        ({"packing": True, "max_length": 40, "batch_size": 1, "accumulate": 2}, False),
        ({"packing": True, "max_length": 50, "batch_size": 2}, True),
        ({"packing": True, "max_length": 40, "batch_size": 1, "accumulate": 2, "layer_major": True}, True),
    ],
    ids=str,
)
def test_a_step_has_the_mean_loss_of_its_trained_tokens_and_its_gradients(
    language, expected, tmp_path, changes, all_trained
):
    loss, gradients = first_step(language, tmp_path, masked(all_trained=all_trained), **changes)
    expected_loss, expected_gradients = expected[all_trained]
    assert loss == pytest.approx(expected_loss, rel=LOSS_ROUNDOFF)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        error = (gradients[name].double() - gradient).abs().max()
        assert error <= ROUNDOFF * gradient.abs().max(), name


@pytest.mark.parametrize("all_trained", [True, False])
def test_the_loss_that_the_start_is_checked_by_is_the_mean_of_its_trained_tokens(
    language, expected, tmp_path, all_trained
):
    made = trainer(language, tmp_path, masked(all_trained=all_trained), settings())
    (batch,) = made.get_train_dataloader()
    assert made.start_loss(batch).item() == pytest.approx(expected[all_trained][0], rel=LOSS_ROUNDOFF)


def test_the_loss_of_a_cpu_takes_few_tokens_at_a_time(language, tmp_path, monkeypatch):
    monkeypatch.setattr(chunked_logprob, "TOKEN_CHUNK_SIZE", 4096)  # TRL's
    trainer(language, tmp_path, sequences(), settings())
    assert chunked_logprob.TOKEN_CHUNK_SIZE == 256


@pytest.mark.parametrize(("is_on", "times"), [(False, 1), (True, 2)])
def test_gradient_checkpointing_computes_activations_twice(language, tmp_path, is_on, times):
    made = trainer(language, tmp_path, sequences(), settings(gradient_checkpointing=is_on))
    calls = []
    made.model.get_submodule("model.layers.0.mlp.up_proj").register_forward_hook(lambda *_: calls.append(1))
    made.train()
    assert len(calls) == times


def test_a_model_that_mixes_the_sequences_of_a_row_is_stopped(language, tmp_path):
    """It has attention for which transformers makes no masks."""
    ALL_ATTENTION_FUNCTIONS.register("no_masks", ALL_ATTENTION_FUNCTIONS["sdpa"])
    made = trainer(language, tmp_path, sequences(), settings(packing=True))
    made.model.config._attn_implementation = "no_masks"
    with pytest.raises(TrainingStopped, match=r"losses that differ by \d+.\d+ nats per token"):
        made.train()


def test_only_the_adapter_moves(language, tmp_path):
    made = trainer(language, tmp_path, sequences(), settings(steps=2))
    model = made.model
    before = {name: value.clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}
    made.train()
    moved = {
        name for name, value in [*model.named_parameters(), *model.named_buffers()] if not value.equal(before[name])
    }
    assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
def test_8_bit_optimizers_keep_8_bits_of_what_is_large_enough(language, tmp_path, optimizer):
    made = trainer(language, tmp_path, sequences(), settings(optimizer=optimizer))
    made.train()
    dtypes = {
        (parameter.numel() >= LEAST_8_BIT, made.optimizer.state[parameter][name].dtype)
        for parameter in trained(made.model).values()
        for name in ("state1", "state2")
    }
    assert dtypes == {(True, torch.uint8), (False, torch.float32)}  # k and v have 128 outputs


@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw_32bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
def test_the_first_step_of_adamw_has_the_size_of_the_learning_rate(language, tmp_path, optimizer):
    """m / sqrt(v) is the sign of the gradient at first (arXiv:1412.6980, algorithm 1), up to epsilon."""
    made = trainer(language, tmp_path, sequences(), settings(optimizer=optimizer, max_grad_norm=0.0), Keep)
    before = {name: p.detach().clone() for name, p in trained(made.model).items()}
    made.train()
    for name, parameter in trained(made.model).items():
        gradient = made.watch.gradients[name]
        step = -1e-3 * gradient / (gradient.abs() + 1e-8)
        assert torch.allclose(parameter - before[name], step, rtol=1e-3, atol=2.0**-24)  # of parameters below 1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch_size": 1, "accumulate": 4},
        {"batch_size": 2, "accumulate": 2},
        {"batch_size": 1, "accumulate": 4, "layer_major": True, "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_a_classifier_has_the_mean_cross_entropy_of_its_examples_however_they_are_divided(
    classifier, tmp_path, changes
):
    rows = {"input_ids": sequences()["input_ids"], "labels": [2, 0, 1, 2]}
    made = trainer(classifier, tmp_path, rows, settings(**changes), Keep, labels=("a", "b", "c"))
    for module in made.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    logits = torch.cat([made.model(torch.tensor([ids])).logits for ids in rows["input_ids"]]).double()
    expected = -logits.log_softmax(-1)[range(4), rows["labels"]].mean()
    parameters = trained(made.model)
    gradients = dict(zip(parameters, torch.autograd.grad(expected, list(parameters.values())), strict=True))
    made.train()
    assert made.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=LOSS_ROUNDOFF)
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert (made.watch.gradients[name] - gradient).abs().max() <= ROUNDOFF * largest, name


def test_parameters_are_those_of_the_rank(language, tmp_path):
    made = trainer(language, tmp_path, sequences(), settings())
    weights = json.loads((language / "qsvd.json").read_text())["weights"].values()
    assert sum(p.numel() for p in trained(made.model).values()) == sum(RANK * sum(w["shape"]) for w in weights)
