"""The plan of the output files, against the files that are then written."""

from itertools import pairwise

import pytest
import safetensors.torch
import torch

import qsvd
from qsvd.files.check import check_complete
from qsvd.files.quantize_folder import plan_shards, sizes_of
from qsvd.files.source import open_checkpoint
from qsvd.numerics.nf4 import NormalFloat4
from qsvd.plan.allocation import Choice, uniform
from qsvd.plan.weights import Source, WeightSpec, plan_model
from tests.checkpoints import write_checkpoint

OVERHEAD = 3000  # bytes; what the bounds exceed a tiny file by, all its header's room and states together, per weight


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    write_checkpoint(folder, vocab_size=1024)
    return folder


def planned(source, most_bytes, *, double_quant=True, rank=4):
    checkpoint = open_checkpoint(str(source))
    plan = check_complete(checkpoint, plan_model(checkpoint.config))
    same = uniform(plan.weights, Choice(NormalFloat4(double_quant=double_quant), rank))
    shards = plan_shards(checkpoint, plan.weights, same, most_bytes)
    return checkpoint, plan, shards, sizes_of(checkpoint, plan.weights, shards, same, torch.bfloat16)


def test_one_file_has_the_plain_name_and_holds_everything(source):
    checkpoint, plan, shards, _ = planned(source, 10**9)
    assert [shard.file for shard in shards] == ["model.safetensors"]
    assert sorted(shards[0].weights) == list(range(len(plan.weights)))
    assert set(shards[0].copied) == set(checkpoint.tensors) - {spec.name for spec in plan.weights}


@pytest.mark.parametrize("most_bytes", [10**4, 2 * 10**4, 10**5])
def test_every_tensor_is_in_one_file_in_the_order_of_the_source(source, most_bytes):
    checkpoint, plan, shards, _ = planned(source, most_bytes)
    count = len(shards)
    assert count > 1
    assert [shard.file for shard in shards] == [
        f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
    ]
    order = list(checkpoint.tensors)
    places = []
    for shard in shards:
        names = {*shard.copied, *(plan.weights[number].name for number in shard.weights)}
        places.append(sorted(order.index(name) for name in names))
        assert shard.num_bytes <= most_bytes or len(names) == 1
    assert [place for group in places for place in group] == list(range(len(order)))


def test_a_stack_is_divided_among_files_by_its_weights_and_not_copied(tmp_path):
    write_checkpoint(tmp_path)
    tensors = {
        "a": torch.ones(4),
        "stack": torch.ones(3, 64, 64, dtype=torch.float16),
        "z": torch.ones(4),
    }  # a and z come first in the file
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(str(tmp_path))
    weights = [WeightSpec(f"{n}.weight", str(n), (64, 64), "up", 0, (Source("stack", index=n),)) for n in range(3)]
    same = uniform(weights, Choice(NormalFloat4(double_quant=True), 0))
    shards = plan_shards(checkpoint, weights, same, 7000)
    assert [(shard.weights, shard.copied) for shard in shards] == [((0,), ("a", "z")), ((1,), ()), ((2,), ())]
    assert sizes_of(checkpoint, weights, shards, same, torch.bfloat16).source == 3 * 64 * 64 * 2


def test_no_two_neighbouring_files_could_have_been_one(source):
    shards = planned(source, 2 * 10**4)[2]
    for shard, following in pairwise(shards):
        assert shard.num_bytes + following.num_bytes > 2 * 10**4


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("rank", [0, 4])
def test_the_files_are_at_most_as_large_as_planned_and_not_much_smaller(source, tmp_path, double_quant, rank):
    _, plan, shards, sizes = planned(source, 10**5, double_quant=double_quant, rank=rank)
    options = qsvd.Quantize(
        str(source), out=tmp_path / "out", rank=rank, double_quant=double_quant, shard_size="100KB", iterations=1
    )
    qsvd.quantize(options)
    written = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("model*.safetensors")}
    assert written.keys() == {shard.file for shard in shards}
    for shard in shards:
        room = OVERHEAD * (1 + len(shard.weights))
        assert written[shard.file] <= shard.num_bytes <= written[shard.file] + room
    adapter = tmp_path / "out" / "adapter_model.safetensors"
    assert adapter.is_file() == (rank > 0)
    if rank:
        assert adapter.stat().st_size <= sizes.factors <= adapter.stat().st_size + OVERHEAD * len(plan.weights)
    assert sum(written.values()) <= sizes.residual + sizes.copied


def test_sizes_count_the_source_and_the_most_that_is_on_disk_at_once(source):
    checkpoint, plan, shards, sizes = planned(source, 10**5, rank=3)
    assert sizes.source == sum(2 * spec.shape[0] * spec.shape[1] for spec in plan.weights)
    assert sizes.copied == sum(entry.num_bytes for entry in checkpoint.tensors.values()) - sizes.source
    exact = sum(2 * 3 * (spec.shape[0] + spec.shape[1]) for spec in plan.weights)
    assert exact <= sizes.factors <= exact + OVERHEAD * len(plan.weights)
    largest = max(shard.num_bytes for shard in shards)
    assert sizes.disk == sizes.residual + sizes.copied + 2 * sizes.factors + largest
