"""Which adapter is started, and each weight's before its first step."""

import dataclasses
import json
import math
import shutil

import pytest
import torch

import qsvd
from qsvd.adapters import start
from qsvd.adapters.adapter import FEW, AdapterOptions
from qsvd.adapters.start import new_record, planned_base, start_adapter
from qsvd.files.split_folder import open_split
from tests.checkpoints import write_checkpoint

NAME = "model.layers.0.mlp.down_proj.weight"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Two results of the same model: with principal components and without."""
    folder = tmp_path_factory.mktemp("results")
    write_checkpoint(folder / "source")
    for rank in (0, 4):
        options = qsvd.Quantize(str(folder / "source"), out=folder / str(rank), rank=rank, iterations=1)
        qsvd.quantize(options)
    return {rank: open_split(folder / str(rank)) for rank in (0, 4)}


def test_the_record_says_what_was_asked_for_and_of_which_base(results):
    split = results[4]
    options = AdapterOptions("lora", rank=8, alpha=4.0, dtype="bfloat16", seed=9)
    record = new_record(split, options, ("a", "b"))
    assert (record.method, record.rank, record.alpha, record.dtype, record.seed) == ("lora", 8, 4.0, "bfloat16", 9)
    assert record.base == str(split.folder.resolve())
    assert record.fingerprint == split.manifest["fingerprint"]
    assert (record.labels, record.full) == (("a", "b"), ())


def test_the_record_of_lora_always_has_its_alpha(results):
    """So that another default in a later version does not change what was trained."""
    split = results[4]
    assert new_record(split, AdapterOptions("lora", rank=8)).alpha == 8 / 4
    assert new_record(split, AdapterOptions("lora", rank=8, rslora=True)).alpha == 2
    assert new_record(split, AdapterOptions("pissa")).alpha is None


def test_an_equal_model_elsewhere_has_the_same_plan_and_another_config_or_option_another(results, tmp_path):
    split, record = results[4], new_record(results[4], AdapterOptions())
    plan = planned_base(split, record, torch.float32)
    copied = open_split(shutil.copytree(split.folder, tmp_path / "copy"))
    assert planned_base(copied, new_record(copied, AdapterOptions()), torch.float32) is plan
    short = planned_base(copied, new_record(copied, AdapterOptions("lora", rank=1)), torch.float32)
    assert [one.shape[0] for one in short.parameters[:2]] != [one.shape[0] for one in plan.parameters[:2]]
    assert planned_base(copied, record, torch.bfloat16).dtype == torch.bfloat16
    less = dataclasses.replace(copied, manifest=copied.manifest | {"weights": results[0].weights})
    assert planned_base(less, new_record(less, AdapterOptions("lora")), torch.float32).buffers == 0, "no components"
    with_components = new_record(copied, AdapterOptions("lora"))
    assert planned_base(copied, with_components, torch.float32).buffers > 0
    path = copied.folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 16}))
    assert planned_base(copied, record, torch.float32).text_config.vocab_size == 16


def test_pissa_is_the_method_where_all_weights_have_components_and_lora_where_one_has_none(results):
    assert new_record(results[4], AdapterOptions()).method == "pissa"
    assert new_record(results[0], AdapterOptions()).method == "lora"
    weights = results[4].weights | {NAME: results[0].weights[NAME]}
    mixed = dataclasses.replace(results[4], manifest=results[4].manifest | {"weights": weights})
    assert new_record(mixed, AdapterOptions()).method == "lora"


@pytest.mark.parametrize(
    ("options", "per_weight"),
    [
        (AdapterOptions("pissa"), lambda rows, columns: 4 * (rows + columns)),
        (AdapterOptions("lora", rank=2), lambda rows, columns: 2 * (rows + columns)),
        (AdapterOptions("edora", rank=3), lambda rows, _: 9 + rows),
        (
            AdapterOptions("r-lora", rank=2, own={"heads": 3}),
            lambda rows, columns: 2 * columns + 6 * rows + 3 * columns,
        ),
        (
            AdapterOptions("kron-lora", rank=2, own={"kron_out": 2, "kron_in": 8}),
            lambda rows, columns: 16 + 2 * (rows // 2 + columns // 8),
        ),
    ],
)
def test_parameters_are_float32_up_to_a_number_and_bfloat16_from_there(results, options, per_weight, monkeypatch):
    count = sum(per_weight(*weight["shape"]) for weight in results[4].weights.values())
    assert new_record(results[4], options).dtype == "float32"
    monkeypatch.setattr(start, "FEW", count)
    assert new_record(results[4], options).dtype == "float32"
    monkeypatch.setattr(start, "FEW", count - 1)
    assert new_record(results[4], options).dtype == "bfloat16"
    told = dataclasses.replace(options, dtype="float32")
    assert new_record(results[4], told).dtype == "float32"


def test_that_number_takes_4_gigabytes():
    bytes_each = 4 * 4  # float32: parameter, gradient and two moments
    assert math.log2(FEW * bytes_each) == 32


@pytest.mark.parametrize(
    ("options", "labels", "said"),
    [
        (AdapterOptions("dore"), (), r"method 'dore' is not one of pissa, lora, edora, lora-xs"),
        (AdapterOptions(dtype="float16"), (), r"adapter dtype 'float16' is not one of auto, float32, bfloat16$"),
        (
            AdapterOptions("pissa", dropout=0.1),
            (),
            r"dropout is an option of the method lora or r-lora or weightlora, and the method is pissa",
        ),
        (
            AdapterOptions("edora", rslora=True),
            (),
            r"rslora is an option of the method lora or .*melora or cora or delta-lora, and the method is edora",
        ),
        (AdapterOptions(dropout=0.1), (), r"the method is pissa: choose lora \(--method lora\), or leave dropout out$"),
        (AdapterOptions("lora", dropout=1.0), (), r"dropout 1 is not a number from 0 to below 1$"),
        (AdapterOptions(target_modules=("q_prj",)), (), r"no quantized layer is called q_prj \(nearest: q_proj"),
        (
            AdapterOptions("melora", own={"blocks": 64}),
            (),
            r"--blocks 64 does not divide both sides of 4 of 14 layers \(out x in\): model.layers.0.self_attn.k_proj "
            r"\(32 x 64\), .*1\.self_attn\.v_proj \(32 x 64\); set --blocks to a divisor of 32; or train other layers",
        ),
        (
            AdapterOptions("kron-lora", own={"kron_out": 3, "kron_in": 128}, target_modules=("down_proj",)),
            (),
            r"--kron-out 3 does not divide the outputs of 2 of 2 .* divisor of 64; or train other layers",
        ),
        (AdapterOptions(), ("only",), r"labels has the one class 'only'; a classifier needs at least two$"),
    ],
)
def test_what_there_is_not_is_refused(results, options, labels, said):
    with pytest.raises(ValueError, match=said):
        new_record(results[4], options, labels)


def test_a_plan_of_the_16_bit_model_refuses_it_too(results):
    source = str(results[4].folder.parent / "source")
    with pytest.raises(qsvd.BadInput, match="--blocks 64 does not divide both sides of 4 of 14 layers"):
        qsvd.plan(source, method="melora", blocks=64, device="cpu")


@pytest.mark.parametrize(
    "options", [AdapterOptions("pissa", rank=3), AdapterOptions("edora", rank=5), AdapterOptions("lora", rank=0)]
)
def test_a_refusal_names_folder_and_weight(results, options):
    split = results[4]
    with pytest.raises(ValueError, match=rf"{split.folder}: {NAME}: rank {options.rank} is "):
        start_adapter(split, new_record(split, options), NAME, CPU)


def test_an_adapter_starts_from_the_factors_of_its_weight(results):
    up, down = results[4].factors(NAME)
    adapter = start_adapter(results[4], new_record(results[4], AdapterOptions("pissa")), NAME, CPU)
    assert torch.equal(adapter.up, up.float())
    assert torch.equal(adapter.down, down.float())


@pytest.mark.parametrize("rank", [0, 4])
def test_draws_repeat_and_differ_by_weight_and_by_seed(results, rank):
    def drawn(seed):
        record = new_record(results[rank], AdapterOptions("lora", rank=2, seed=seed))
        return {name: start_adapter(results[rank], record, name, CPU).down.detach() for name in results[rank].weights}

    torch.manual_seed(1)
    first, again, other = drawn(0), drawn(0), drawn(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    draws = [*first.values(), *other.values()]
    assert len({tuple(draw.flatten()[:8].tolist()) for draw in draws}) == len(draws)


def test_a_draw_does_not_depend_on_what_was_drawn_before_and_leaves_torchs_generator_alone(results):
    record = new_record(results[4], AdapterOptions("lora", rank=2))
    before = torch.get_rng_state()
    alone = start_adapter(results[4], record, NAME, CPU).down
    start_adapter(results[4], record, "model.layers.1.mlp.down_proj.weight", CPU)
    assert torch.equal(start_adapter(results[4], record, NAME, CPU).down, alone)
    assert torch.equal(torch.get_rng_state(), before)
