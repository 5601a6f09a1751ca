"""Several processes hold one residual together: each keeps its part, and gathers a block while it computes."""

import json
import os
import signal
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import qsvd
from qsvd import ranks
from qsvd.adapters.model import is_sharded, split_linears
from qsvd.adapters.start import new_record, planned_base
from qsvd.cli import run
from qsvd.files.split_folder import open_split
from qsvd.memory.frozen import residual_items
from qsvd.memory.items import Placement
from qsvd.training.together import join_group
from tests.memory.counting import llama_base
from tests.ranks.processes import each, lines, together
from tests.runs import text_rows, write_rows

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
LORA = qsvd.AdapterOptions("lora", rank=2)
IDS = torch.arange(8)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    llama_base(folder, 4, ranks=(4, 0), hidden_size=128, intermediate_size=320, num_hidden_layers=5)
    return folder


class Whole(TorchDispatchMode):
    """most: the most bytes at a time of storages of some size; FSDP empties a storage without an end of its tensor."""

    def __init__(self, size):
        super().__init__()
        self.most, self._size, self._seen = 0, size, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if torch.is_tensor(tensor) and self._is_block(tensor.untyped_storage()):
                self._seen[id(tensor.untyped_storage())] = weakref.ref(tensor.untyped_storage())
        alive = [found for one in self._seen.values() if (found := one()) is not None and self._is_block(found)]
        self.most = max(self.most, sum(storage.nbytes() for storage in alive))
        return made

    def _is_block(self, storage):
        return self._size <= storage.nbytes() < self._size + 8


def loaded(base, count):
    ranks.join()
    join_group(torch.device("cpu"))
    return qsvd.load(base, options=LORA, device="cpu", placement=Placement(shards=count))


def test_a_process_holds_its_part_and_three_blocks_and_a_copy_at_most(folder, tmp_path):
    base, count = folder / "out", 2
    alone = qsvd.load(base, options=LORA, device="cpu")
    alone(input_ids=IDS, labels=IDS).loss.backward()
    expected = [p.grad for p in alone.parameters() if p.grad is not None]
    split = open_split(base)
    plan = planned_base(split, new_record(split, LORA), torch.float32)
    page = max(block.page for block in plan.blocks)

    def work(rank):
        model = loaded(base, count)
        pages = next(linear.paged.cache for _, linear in split_linears(model)).pages()
        model.train().activation_checkpointing_enable()
        model.enable_input_require_grads()
        with Whole(page) as tracker:
            for _ in range(2):
                model.zero_grad()
                model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        found = [p.grad for p in model.parameters() if p.grad is not None]
        parts = [page.to_local().untyped_storage().nbytes() for page in pages]
        (tmp_path / f"{rank}.json").write_text(
            json.dumps([parts, tracker.most, all(map(torch.equal, found, expected)), len(found), is_sharded(model)])
        )
        return 0

    codes, shown = each(count, tmp_path / "shown", work)
    assert codes == [0] * count, shown
    planned = {item.name: item.host for item in residual_items(plan, Placement(shards=count), "cpu")}
    for rank in range(count):
        parts, most, are_equal, number, is_divided = json.loads((tmp_path / f"{rank}.json").read_text())
        assert (are_equal, number, is_divided) == (True, len(expected), True)
        assert sum(parts) <= planned["residual codes"] < sum(parts) + 8 * len(parts)
        assert most <= planned["page slots"] + 8 * count
        assert most >= 2 * page


def test_weights_that_are_read_outside_of_their_block_are_refused(folder, tmp_path):
    def work(rank):
        del rank
        model = loaded(folder / "out", 2)
        with pytest.raises(qsvd.BadInput, match=r"^--shard cannot train this model: its forward pass reads "):
            next(split_linears(model))[1].residual.decode()
        return 0

    codes, shown = each(2, tmp_path / "shown", work)
    assert codes == [0, 0], shown


def test_a_dry_run_counts_the_parts_and_names_the_processes(folder, tmp_path):
    rows = write_rows(tmp_path / "texts.jsonl", text_rows())
    words = (
        "train",
        folder / "out",
        rows,
        "--out",
        tmp_path / "run",
        "--device",
        "cpu",
        "--max-length",
        40,
        "--gradient-checkpointing",
        "yes",
        "--dry-run",
    )
    assert run([*map(str, words)]) == 0  # so that those that it forks know the plan of the blocks
    codes, shown = together(2, tmp_path / "shown", *words, "--shard", "yes")
    assert codes == [0, 0], shown
    out, err = shown[0]
    assert "each of 2 processes keeps its part of every block" in out
    assert "Next: torchrun --nproc-per-node 2 -m qsvd train " in err
    assert err.rstrip().endswith("--shard yes")


WRONG = {  # options -> processes, sentence
    ("--shard", "yes"): (
        1,
        "--shard yes divides the weights among several processes, and there is one: start `torchrun --nproc-per-node N "
        "-m qsvd train ...`, or leave it out",
    ),
    ("--shard", "offload"): (
        2,
        "--shard offload needs a GPU; on a CPU the parts are in CPU memory already: give --shard yes",
    ),
    ("--shard", "yes", "--layer-major"): (
        2,
        "--shard gathers a block for each batch, and --layer-major divides them: give one of them",
    ),
    ("--shard", "yes", "--resident", "0.5"): (
        2,
        "--resident 0.5 keeps whole blocks on the GPU, and --shard yes keeps a part of each: give one of them",
    ),
}


@pytest.mark.parametrize("options", WRONG, ids=" ".join)
def test_what_cannot_be_divided_is_refused_in_a_sentence(folder, tmp_path, options):
    count, sentence = WRONG[options]
    rows = write_rows(tmp_path / "texts.jsonl", text_rows())
    words = ("train", folder / "out", rows, "--out", tmp_path / "run", "--device", "cpu", "--max-length", 40, *options)
    codes, shown = together(count, tmp_path / "shown", *words)
    assert 2 in codes, shown
    assert set(codes) <= {2, -signal.SIGTERM}
    assert lines(shown) == [f"qsvd: {sentence}"]
    assert not (tmp_path / "run").exists()
    assert "RANK" not in os.environ
