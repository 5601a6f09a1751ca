"""What a split model trains, saves, takes back and is compared with."""

import json
from functools import cache

import pytest
import safetensors.torch
import torch
import transformers

import qsvd
from qsvd.adapters.linear import SplitLinear
from qsvd.adapters.methods.table import METHODS
from qsvd.adapters.model import SplitModel, split_linears, trained
from tests.adapters.results import (
    IDS,
    assert_as_exact_as_float32,
    exact_outputs,
    modules_of,
    outputs,
    plain_model,
    split_checkpoint,
)
from tests.gradients import write_gradients
from tests.sealed import reseal

PARAMETERS = {
    "pissa": ("up", "down"),
    "lora": ("up", "down"),
    "edora": ("core", "magnitude"),
    "lora-xs": ("core",),
    "sorsa": ("up", "diagonal", "down"),
    "dora": ("up", "down", "magnitude"),
    "adalora": ("up", "diagonal", "down"),
    "lora-fa": ("up",),
    "vera": ("b", "d"),
    "lora-ga": ("up", "down"),
    "randlora": ("lam", "gam"),
    "sara": ("up", "diagonal", "down"),
    "mo-sara": ("cores", "w1", "w2", "v"),
    "r-lora": ("down", "up", "router"),
    "melora": ("up", "down"),
    "kron-lora": ("kron", "up", "down"),
    "singlora": ("down",),
    "symlora": ("down", "diagonal"),
    "lora-mini": ("inner_up", "inner_down"),
    "cora": ("down",),
    "lorta": (),
    "lora2": ("up", "inner_up", "diagonal", "inner_down", "down"),
    "delta-lora": ("up", "down"),
    "xgblora": ("up", "down"),
    "weightlora": ("up", "down", "gate"),
    "losa": ("up", "down"),
}
COMMON = {"lorta": ("up", "down", "heads", "matrices", "attentions")}  # of all layers, by the name of the first
ATTENTION = "model.layers.0.self_attn.q_proj"
FIRST = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return split_checkpoint(tmp_path_factory.mktemp("result"))


def stepped(model, *, steps=2):
    """After optimizer steps that change every parameter."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _, linear in split_linears(model) if model.split_record.method == "singlora" else ():
        linear.adapter.ramp.fill_(0.5)  # by hooks in a run of qsvd
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model


def rewritten(folder, change):
    """The same folder with other tensors in it."""
    path = folder / "qsvd_adapter.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(path)
    del metadata["qsvd_digests"]
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata=metadata)
    reseal(folder / "qsvd_adapter.json", lambda record: record.pop("files"))
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Models by their number of blocks, with their exact outputs."""

    @cache
    def of(blocks):
        out = split_checkpoint(tmp_path_factory.mktemp("small"), num_hidden_layers=blocks)
        return out, exact_outputs(plain_model(out))

    return of


@pytest.mark.parametrize(
    ("method", "dtype"),
    [(name, "bfloat16" if number % 2 and name != "r-lora" else "float32") for number, name in enumerate(METHODS)],
)
def test_every_method_starts_from_the_same_outputs_and_what_is_saved_comes_back_to_the_bit(
    small, tmp_path, method, dtype
):
    out, exact = small(2 if method in COMMON else 1)
    own = {"gradients": write_gradients(out, tmp_path / "g", 32)} if method == "lora-ga" else {}
    options = qsvd.AdapterOptions(method, dtype=dtype, seed=3, own=own)
    model = qsvd.load(out, options=options)
    assert model.split_record.method == method
    assert_as_exact_as_float32(model, exact)
    before = outputs(model)
    assert not torch.equal(outputs(stepped(model)), before)
    model.save_pretrained(tmp_path / "run")
    again = qsvd.load(out, adapter=str(tmp_path / "run"))
    ours, theirs = trained(model), trained(again)
    common = {f"{ATTENTION}.{name}" for name in COMMON.get(method, ())}
    alone = {f"{path}.{name}" for path in modules_of(out) for name in PARAMETERS[method]}
    assert set(ours) == set(theirs) == alone | common
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    assert torch.equal(outputs(model), outputs(again))
    assert again.split_record == model.split_record
    assert not again.training


def test_a_save_writes_two_files_and_no_frozen_tensor(out, tmp_path):
    model = qsvd.load(out)
    model.save_pretrained(tmp_path / "run", state_dict={}, safe_serialization=True)  # transformers' trainer says more
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"qsvd_adapter.json", "qsvd_adapter.safetensors"}
    found = safetensors.torch.load_file(tmp_path / "run" / "qsvd_adapter.safetensors")
    assert set(found) == {f"{path}.{name}" for path in modules_of(out) for name in ("up", "down")}
    record = json.loads((tmp_path / "run" / "qsvd_adapter.json").read_text())
    assert (record["base"], record["method"], record["labels"], record["full"]) == (str(out.resolve()), "pissa", [], [])


def test_a_checkpoint_can_be_trained_on(out, tmp_path):
    """Resuming from the file is going on in memory."""
    straight = stepped(qsvd.load(out), steps=1)
    straight.save_pretrained(tmp_path / "run")
    resumed = stepped(qsvd.load(out, adapter=tmp_path / "run"), steps=1)
    assert torch.equal(outputs(stepped(straight, steps=1)), outputs(resumed))


def test_names_of_modules_and_of_what_is_trained(out):
    model = qsvd.load(out)
    linears = dict(split_linears(model))
    assert list(linears) == [path for path, module in model.named_modules() if isinstance(module, SplitLinear)]
    assert set(linears) == modules_of(out)
    parameters = trained(model)
    assert parameters[f"{FIRST}.up"] is linears[FIRST].adapter.up
    assert len(parameters) == 2 * len(linears)


def test_a_reference_shares_what_is_frozen_and_stays_when_the_model_is_trained(out):
    model = qsvd.load(out).train()
    reference = model.reference()
    before = outputs(reference)
    theirs = dict((*reference.named_parameters(), *reference.named_buffers()))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        shared = theirs[name].data_ptr() == tensor.data_ptr()
        assert shared == (not tensor.requires_grad), name
        assert torch.equal(theirs[name], tensor)
    assert not any(p.requires_grad for p in reference.parameters())
    assert not any(module.training for module in reference.modules())
    assert model.training
    stepped(model)
    assert torch.equal(outputs(reference), before)
    assert not torch.equal(outputs(model), before)
    assert len(trained(model)) == 2 * len(modules_of(out)), "the model itself is still trained"


def test_a_reference_is_the_model_at_that_moment_and_tied_as_it_is(tmp_path):
    model = stepped(qsvd.load(split_checkpoint(tmp_path, tie_word_embeddings=True)))
    reference = model.reference()
    assert torch.equal(outputs(reference), outputs(model))
    assert reference.lm_head.weight is reference.model.embed_tokens.weight is model.lm_head.weight
    assert type(reference) is type(model)


def test_an_adapter_of_another_residual_is_refused(out, tmp_path):
    other = split_checkpoint(tmp_path, seed=1)
    qsvd.load(other).save_pretrained(tmp_path / "run")
    with pytest.raises(ValueError, match=r"run was trained on another quantized model than .*out: the fingerprints"):
        qsvd.load(out, adapter=tmp_path / "run")


def test_a_base_that_was_moved_is_the_same_base(out, tmp_path):
    model = stepped(qsvd.load(out))
    model.save_pretrained(tmp_path / "run")
    moved = out.with_name("moved")
    out.rename(moved)
    try:
        assert torch.equal(outputs(qsvd.load(moved, adapter=tmp_path / "run")), outputs(model))
    finally:
        moved.rename(out)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop(f"{FIRST}.up"), rf"1 parameters are missing: {FIRST}\.up$"),
        (lambda tensors: tensors.update(strange=torch.ones(1)), "1 parameters are unknown: strange$"),
        (
            lambda tensors: tensors.update({f"{FIRST}.up": tensors[f"{FIRST}.up"].T.contiguous()}),
            rf"1 parameters have other shapes: {FIRST}\.up$",
        ),
        (
            lambda tensors: tensors.update(strange=tensors.pop(f"{FIRST}.down")),
            rf"1 parameters are missing: {FIRST}\.down; 1 parameters are unknown: strange$",
        ),
    ],
)
def test_parameters_that_do_not_fit_are_refused(out, tmp_path, change, said):
    qsvd.load(out).save_pretrained(tmp_path / "run")
    with pytest.raises(ValueError, match=rf"run does not fit the model: {said}"):
        qsvd.load(out, adapter=rewritten(tmp_path / "run", change))


@pytest.mark.parametrize("given", [{"options": qsvd.AdapterOptions()}, {"labels": ("a", "b")}])
def test_an_adapter_says_itself_what_it_is(out, tmp_path, given):
    qsvd.load(out).save_pretrained(tmp_path / "run")
    with pytest.raises(ValueError, match=r"options and labels are stored in the adapter .*run: leave them out"):
        qsvd.load(out, adapter=tmp_path / "run", **given)


def test_an_adapter_of_a_method_that_there_is_not_is_refused(out, tmp_path):
    qsvd.load(out).save_pretrained(tmp_path / "run")
    reseal(tmp_path / "run" / "qsvd_adapter.json", lambda record: record.update(method="dore"))
    with pytest.raises(ValueError, match="method 'dore' is not one of pissa, lora, edora"):
        qsvd.load(out, adapter=tmp_path / "run")


def test_a_folder_without_an_adapter_is_refused(out):
    with pytest.raises(ValueError, match="holds no trained adapter"):
        qsvd.load(out, adapter=out)


@pytest.mark.parametrize("name", ["Llama4ForCausalLM", "Llama4ForConditionalGeneration"])
def test_the_part_below_the_head_is_found_where_transformers_names_none(name):
    """TRL takes hidden states from it."""
    text = {"hidden_size": 64, "intermediate_size": 64, "intermediate_size_mlp": 64, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96, "pad_token_id": 0}
    vision = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    config: object = transformers.Llama4TextConfig(**text)
    if name != "Llama4ForCausalLM":
        config = transformers.Llama4Config(text_config=text, vision_config=vision | {"image_size": 32})
    architecture = getattr(transformers, name)
    model = type(name, (SplitModel, architecture), {})(config)
    outputs = model.base_model(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False)
    assert outputs.last_hidden_state.shape == (1, 4, 64)
