"""What is decided before any work: sizes, dtypes, the identity of a run, and what a loader must skip."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

import qsvd
import qsvd.prepare.models
from qsvd.calibrate.sums import Example
from qsvd.commands.quantize import quantize_run
from qsvd.decompose.alternate import STACK
from qsvd.decompose.moments import Moments
from qsvd.decompose.objective import PLAIN
from qsvd.errors import DoesNotFit
from qsvd.options.quantizing import with_quality
from qsvd.plan.weights import Source, plan_model
from qsvd.prepare import allocate
from qsvd.prepare.allocate import AllocateRun, measure_and_solve
from qsvd.prepare.quantize import prepare_quantize
from qsvd.prepare.quantizing import resources
from qsvd.prepare.quantizing.resources import check_resources
from qsvd.records import show_nothing
from tests.checkpoints import tiny_config, write_checkpoint
from tests.decompose.test_moments import both, moment, square


@pytest.fixture
def options(tmp_path):
    model = tmp_path / "model"
    write_checkpoint(model)
    return qsvd.Quantize(str(model), out=tmp_path / "out", rank=4)


def test_the_identity_is_json_and_comes_back_equal(options):
    identity = prepare_quantize(replace(options, include=("*.q_proj",))).identity
    assert json.loads(json.dumps(identity)) == identity


def test_what_changes_the_bytes_changes_the_identity_and_nothing_else_does(options, tmp_path):
    identity = prepare_quantize(options).identity
    changes = {"rank": 5, "iterations": 2, "order": "quantize", "end": "quantize", "stop": "never", "svd": "exact"}
    changes |= {"dtype": "float32", "double_quant": False, "include": ("*",), "exclude": ("*.q_proj",)}
    changes |= {"shard_size": "1GB", "seed": 1}
    for name, value in changes.items():
        assert prepare_quantize(replace(options, **{name: value})).identity != identity, name
    assert prepare_quantize(replace(options, out=tmp_path / "elsewhere", device="cpu")).identity == identity
    moved = shutil.copytree(options.model, tmp_path / "moved")
    assert prepare_quantize(replace(options, model=str(moved))).identity == identity


def test_another_source_is_another_identity(options, tmp_path):
    write_checkpoint(tmp_path / "wider", vocab_size=97)
    other = replace(options, model=str(tmp_path / "wider"))
    assert prepare_quantize(other).identity != prepare_quantize(options).identity


def test_a_loader_decodes_to_the_dtype_of_most_elements(options, tmp_path):
    model = options.model
    folder = shutil.copytree(model, tmp_path / "mixed")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        tensors[name] = tensor.float() if "self_attn" in name else tensor.half() if "mlp" in name else tensor
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    options = qsvd.Quantize(str(folder), out=tmp_path / "out", rank=4)
    assert prepare_quantize(options).compute_dtype == torch.float16
    assert (
        prepare_quantize(replace(options, include=("*.self_attn.*", "*.0.mlp.up_proj"))).compute_dtype == torch.float32
    )
    assert prepare_quantize(qsvd.Quantize(model, out=tmp_path / "out", rank=4)).compute_dtype == torch.bfloat16


def test_one_iteration_that_only_quantizes_is_for_rank_0_alone(options):
    once = replace(options, order="quantize", end="quantize", iterations=1)
    assert prepare_quantize(replace(once, rank=0)).recipe("model.layers.0.mlp.up_proj").rank == 0
    with pytest.raises(ValueError, match="needs at least 2 iterations"):
        prepare_quantize(once)


def test_heads_that_a_user_may_add_are_skipped_by_a_loader(options):
    assert set(prepare_quantize(options).skipped) == {"lm_head", "classifier", "score", "qa_outputs"}


def test_a_split_that_transformers_would_not_load_is_refused(options, monkeypatch):
    plan_model = qsvd.prepare.models.plan_model

    def with_another_linear_left(*arguments, **patterns):
        return replace(plan_model(*arguments, **patterns), left_linears=("0.mlp.up_proj", "lm_head"))

    monkeypatch.setattr(qsvd.prepare.models, "plan_model", with_another_linear_left)
    with pytest.raises(ValueError, match=r"cannot tell model\.layers\.0\.mlp\.up_proj from the layers that stay"):
        prepare_quantize(options)


def test_a_weight_that_cannot_be_split_in_what_is_free_is_refused_before_any_is_read(options, monkeypatch):
    monkeypatch.setattr("qsvd.commands.quantize.stream", None)
    monkeypatch.setattr("qsvd.prepare.machine.free_host_memory", lambda: 310_000_000)
    check_resources(prepare_quantize(options))  # 300 MB of them are a reserve
    monkeypatch.setattr("qsvd.prepare.machine.free_host_memory", lambda: 300_000_000)
    with pytest.raises(DoesNotFit, match=r"needs .* more CPU memory to split model\.layers\.0\.mlp\.gate_proj\.weight"):
        qsvd.quantize(options)
    assert not options.out.exists()


@pytest.mark.parametrize(("missing", "fits"), [(0, True), (1, False)])
def test_the_disk_must_hold_the_largest_moment_to_the_byte(options, monkeypatch, missing, fits):
    job = prepare_quantize(options)
    give_disk(monkeypatch, job.sizes.disk - missing)
    if fits:
        check_resources(job)
        return
    with pytest.raises(DoesNotFit, match="more disk space"):
        check_resources(job)


def test_what_an_earlier_run_wrote_need_not_fit_again(options, monkeypatch):
    job = prepare_quantize(options)
    (job.out / "unfinished").mkdir(parents=True)
    (job.out / "unfinished" / "00000.residual").write_bytes(bytes(1000))
    give_disk(monkeypatch, job.sizes.disk - 1000)
    check_resources(job)
    give_disk(monkeypatch, job.sizes.disk - 1001)
    with pytest.raises(DoesNotFit):
        check_resources(job)


def test_the_disk_is_that_of_the_nearest_folder_that_exists(options, tmp_path, monkeypatch):
    asked = give_disk(monkeypatch, 10**9)
    check_resources(prepare_quantize(replace(options, out=tmp_path / "a" / "b")))
    assert asked == [tmp_path]


def test_a_tilde_is_the_home_folder(options, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert prepare_quantize(replace(options, out=Path("~/result"))).out == tmp_path / "result"


def give_disk(monkeypatch, free):
    asked = []

    def disk_usage(path):
        asked.append(path)
        return shutil._ntuple_diskusage(10**12, 10**12 - free, free)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    return asked


def test_weights_with_sources_of_another_name_are_quantized_alike(options, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(options.model, tmp_path / "renamed"))
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    places = {name: f"stored.{name}" for name in tensors if "mlp" in name}
    renamed = {places.get(name, name): tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})

    def with_sources(*args, **kwargs):
        plan = plan_model(*args, **kwargs)
        weights = tuple(
            replace(spec, sources=(Source(places[spec.name]),)) if spec.name in places else spec
            for spec in plan.weights
        )
        return replace(plan, weights=weights, optional=plan.optional | {*places})

    expected = qsvd.quantize(options)
    monkeypatch.setattr(qsvd.prepare.models, "plan_model", with_sources)
    found = qsvd.quantize(replace(options, model=str(folder), out=tmp_path / "found"))
    for file in ("model.safetensors", "errors.jsonl"):
        assert (found / file).read_bytes() == (expected / file).read_bytes()


def test_of_weights_that_are_split_together_the_one_with_a_nan_is_named(options, monkeypatch):
    monkeypatch.setitem(STACK, "cpu", 4 * 64 * 64)
    run = prepare_quantize(replace(options, include=("*.q_proj",)))
    assert run.stacks == [[(0, 1)]]
    file = Path(options.model, "model.safetensors")
    before, tensors = file.stat(), safetensors.torch.load_file(file)
    tensors["model.layers.1.self_attn.q_proj.weight"][0, 0] = torch.nan
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a fault of the disk would leave it
    with pytest.raises(
        ValueError, match=r"layers\.1\.self_attn\.q_proj\.weight: 1 of 4096 values are NaN or infinite; r"
    ):
        quantize_run(run, show_nothing)  # of a file that was whole when the run was checked


def test_stacks_are_of_one_role_shape_codec_and_rank_and_of_one_file(options, tmp_path, monkeypatch):
    """As on a GPU. Of 2 layers: q and o are alike in shape, k and v too, gate and up too."""
    monkeypatch.setitem(STACK, "cpu", 1 << 40)
    run = prepare_quantize(options)
    (stacks,) = run.stacks
    names = [[run.weights[number].module.removeprefix("model.layers.") for number in stack] for stack in stacks]
    assert sorted(map(sorted, names)) == sorted(
        [f"{layer}.{part}" for layer in (0, 1)]
        for part in (*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))
    )
    with_texts = replace(run, examples=(None,))
    assert with_texts.stacks == [[(number,) for number in run.shards[0].weights]]
    write_checkpoint(tmp_path / "large", vocab_size=1024)
    sharded = prepare_quantize(replace(options, model=str(tmp_path / "large"), shard_size="100KB"))
    assert len(sharded.shards) > 1
    for shard, stacks in zip(sharded.shards, sharded.stacks, strict=True):
        assert sorted(number for stack in stacks for number in stack) == sorted(shard.weights)
    monkeypatch.setitem(STACK, "cpu", 1)
    run = prepare_quantize(options)
    assert run.stacks == [[(number,) for number in run.shards[0].weights]]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("fast", 5, "absmax", "nearest", 1, None)),
        ({"quality": "good"}, ("good", 2, "mse", "feedback", 1, None)),
        ({"rounding": "feedback"}, ("fast", 2, "mse", "feedback", 1, None)),
        ({"calibrate": "texts"}, ("best", 4, "mse", "feedback", 2, "both")),
        ({"calibrate": "texts", "quality": "good"}, ("good", 2, "mse", "feedback", 1, "inputs")),
        ({"calibrate": "texts", "rounding": "nearest"}, ("best", 5, "mse", "nearest", 2, "both")),
        (
            {"calibrate": "texts", "iterations": 7, "scales": "absmax", "sensitivity": "inputs"},
            ("best", 7, "absmax", "feedback", 2, "inputs"),
        ),
    ],
)
def test_quality_sets_what_is_left_open(options, given, expected):
    chosen = with_quality(replace(options, **given))
    recipe = replace(prepare_quantize(options), options=chosen).recipe("model.layers.0.mlp.up_proj")
    how = (recipe.iterations, recipe.scales, recipe.rounding, recipe.sweeps)
    assert (chosen.quality, *how, chosen.sensitivity) == expected


@pytest.mark.parametrize(
    ("sensitivity", "expected"),
    [
        ("none", 0),
        ("inputs", 4 * (36864 + 3 * 64**2 + 128**2)),  # weights; inputs of q k v, of o, of gate and up, of down
        ("both", 4 * (36864 + 3 * 64**2 + 128**2 + 3 * 64**2 + 2 * 32**2 + 2 * 128**2)),
    ],
)
def test_memory_holds_a_block_with_its_moments(options, monkeypatch, sensitivity, expected):
    run, asked, plan = prepare_quantize(replace(options, rounding="feedback")), {}, resources.plan_splitting
    if sensitivity != "none":
        run = replace(run, options=replace(run.options, calibrate="texts", sensitivity=sensitivity))
    monkeypatch.setattr(resources, "plan_splitting", lambda *given, **more: asked.update(more) or plan(*given, **more))
    check_resources(run)
    assert (asked["block"], asked["moments"], asked["feeds_back"]) == (expected, sensitivity, True)


def moments_of(shape, factor=1.0):
    return Moments(moment(shape[1]), factor * moment(shape[0], 2))


@pytest.mark.parametrize("rounding", ["nearest", "feedback"])
def test_weighted_errors_are_those_of_the_codec_alone_and_of_the_split(options, monkeypatch, rounding):
    run = prepare_quantize(replace(options, rounding=rounding))
    spec = run.weights[0]
    weight, moments = run.checkpoint.read_weight(spec).float(), moments_of(spec.shape)
    (split,), (error,) = run.split([spec], [weight], [moments])
    alone = split.residual.codec.encode(weight).decode()
    parts = [square(one.double(), *both(moments)) for one in (weight - alone, split.error(weight), weight)]
    found = error.weighted
    assert (found.before, found.after) == pytest.approx([(part / parts[2]) ** 0.5 for part in parts[:2]], rel=1e-4)
    assert not found.kept_nearest
    first = replace(split, iteration=1)
    monkeypatch.setattr("qsvd.prepare.quantize.split_weights", lambda *_, **__: [first])
    assert run.split([spec], [weight], [moments])[1][0].weighted.kept_nearest == (rounding == "feedback")
    assert run.split([spec], [weight], [PLAIN])[1][0].weighted is None


def spent(options, sensitivity, favoured, monkeypatch):
    """Bytes of two equal layers, of which one has gradients a hundred times as large."""
    run = prepare_quantize(replace(options, include=("*.q_proj",), budget="4bits", rounding="feedback"))
    measuring = replace(run, options=replace(run.options, sensitivity=sensitivity)).measuring
    grid = replace(measuring.task.grid, codecs=("nf2-32-3x64-fit", "nf4-64-4x64-fit"), ranks=(0, 4))
    given = [moments_of((64, 64), 10.0**4 if layer == favoured else 1.0) for layer in (0, 1)]
    asked = []
    walk = SimpleNamespace(
        place=lambda spec: -spec.layer, objective=lambda spec: asked.append(spec.layer) or given[spec.layer]
    )
    monkeypatch.setattr(AllocateRun, "open_walk", lambda *_: walk)
    measuring = replace(measuring, task=replace(measuring.task, grid=grid), examples=(Example([1, 2], [1, 2]),))
    result = measure_and_solve(measuring, show_nothing)
    assert asked == [1, 0], "in the order of the walk"
    for spec, moments in zip(run.weights, given, strict=True):
        unit = float(moments.inputs_II.trace() * moments.outputs_OO.trace()) / 64**2 if sensitivity == "both" else 1.0
        norm = square(run.checkpoint.read_weight(spec).double(), *both(moments))
        assert result.norms[spec.module] == pytest.approx(unit * norm, rel=1e-3)
    return [choice.num_bytes((64, 64)) for choice in result.allocation.choices.values()]


@pytest.mark.parametrize("sensitivity", ["inputs", "both"])
def test_with_gradients_a_budget_compares_the_errors_of_layers(options, tmp_path, monkeypatch, sensitivity):
    first, second = (
        spent(replace(options, out=tmp_path / str(layer)), sensitivity, layer, monkeypatch) for layer in (0, 1)
    )
    if sensitivity == "inputs":
        assert first == second
    else:
        assert first[0] > 1.5 * first[1]
        assert second[1] > 1.5 * second[0]


def test_of_a_stack_four_experts_are_measured_and_the_others_have_the_errors_of_those_before_them():
    weights = plan_model(tiny_config("MixtralForCausalLM", num_local_experts=10, num_hidden_layers=1)).weights
    chosen = allocate._measured_ones(weights)
    found = allocate._for_all(weights, chosen, {spec.module: spec.module for spec in chosen})
    for spec in weights:
        path, _, number = spec.module.rpartition(".")
        assert found[spec.module] == (f"{path}.{int(number) // 3 * 3}" if spec.stack else spec.module)
