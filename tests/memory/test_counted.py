"""The planned bytes of what a training run holds are those of its tensors, item by item, to the byte."""

from dataclasses import dataclass

import pytest
import torch

from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.start import new_record, planned_base
from qsvd.files.split_folder import open_split
from qsvd.memory.block_bytes import Batch
from qsvd.memory.items import EVERYTHING, Limits, Placement
from qsvd.memory.training import Training, plan_training
from tests.memory.counting import held_after_a_step, llama_base
from tests.runs import language_base

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")

WIDE = {"hidden_size": 128, "intermediate_size": 320, "tie_word_embeddings": False, "num_hidden_layers": 5}
ODD = {
    "hidden_size": 72,
    "intermediate_size": 200,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "num_hidden_layers": 4,
}

PRILORA = {"rank_end": 14, "prune_every": 1}


@dataclass(frozen=True)
class Case:
    """A run: its base, its adapters, its placement, and the length of its sequences."""

    base: str
    options: AdapterOptions
    optimizer: str
    placement: Placement = EVERYTHING
    tokens: int = 24


CASES = {  # the tensors of a method: tests/adapters/test_tensors.py; those of an optimizer: tests/plan/test_tensors.py
    "embedded rank 16, pissa, 8 bits, its block visits": Case(
        "embedded 16", AdapterOptions("pissa"), "adamw_8bit", Placement(0, "host"), tokens=48
    ),
    "wide and untied, plain scales, paged 32 bits, one of five blocks stays": Case(
        "wide", AdapterOptions("pissa"), "paged_adamw_32bit", Placement(1, "disk"), tokens=40
    ),
    "odd sizes, lora, bfloat16 in 8 bits, three of four blocks wait in memory": Case(
        "odd", AdapterOptions("lora", rank=40, dtype="bfloat16"), "adamw_8bit", Placement(1, "host")
    ),
    "odd sizes, lora with dropout on two kinds of layers, pruned, with ranks by depth": Case(
        "odd", AdapterOptions("lora", rank=8, dropout=0.1, target_modules=("q_proj", "down_proj"), own=PRILORA), "adamw"
    ),
    "odd sizes, adalora": Case("odd", AdapterOptions("adalora", rank=8), "adamw"),
    "odd sizes, lora2": Case("odd", AdapterOptions("lora2", rank=8, own={"inner_size": 5}), "adamw"),
    "odd sizes, singlora, whose trained matrix is larger than a factor": Case(
        "odd", AdapterOptions("singlora", rank=8), "adamw"
    ),
    "odd sizes, vera with two matrices of each size, paged": Case(
        "odd", AdapterOptions("vera", rank=20), "paged_adamw_32bit"
    ),
    "mixed bits and ranks, cora with its bases": Case(
        "mixed", AdapterOptions("cora", rank=8, own={"train_basis": True}), "adamw"
    ),
    "odd sizes, lorta, one of four blocks stays": Case(
        "odd", AdapterOptions("lorta", rank=8), "adamw", Placement(1, "host")
    ),
    "embedded rank 16, dora, by lora-rite": Case("embedded 16", AdapterOptions("dora", rank=8), "lora-rite"),
    "mixed bits and ranks, pissa on attention alone, one of four blocks stays": Case(
        "mixed", AdapterOptions("pissa", target_modules=("*.self_attn.*",)), "adamw", Placement(1, "host")
    ),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A split model by its name; made when it is first asked for."""
    home = tmp_path_factory.mktemp("bases")

    def base(name):
        folder = home / name.replace(" ", "-")
        if name == "wide":
            return llama_base(folder, 8, double_quant=False, **WIDE)
        if name == "mixed":
            return llama_base(folder, 4, ranks=(16, 0, 5), **ODD)
        if name == "odd":
            return llama_base(folder, 4, **ODD)
        return language_base(folder, rank=int(name.removeprefix("embedded ")))

    return base


def planned_items(base, case):
    split = open_split(base)
    model = planned_base(split, new_record(split, case.options), torch.float32)
    batch = Batch(case.tokens, 2, is_masked=False, checkpointing=True, device="cpu")
    plan = plan_training(model, Training(batch, 2, case.optimizer), case.placement, Limits())
    return {item.name: item.host for item in plan.items}


@pytest.mark.parametrize("case", CASES)
def test_a_step_holds_what_was_planned(bases, tmp_path, case):
    case = CASES[case]
    base = bases(case.base)
    changes = {"optimizer": case.optimizer, "batch_size": 2, "accumulate": 2, "gradient_checkpointing": True}
    held = held_after_a_step(base, tmp_path, case.options, case.placement, changes, tokens=case.tokens)
    planned = planned_items(base, case)
    assert {item: planned.get(item, 0) for item in held} == held
    assert held["trained parameters"] > 0
    assert held["optimizer state"] > 0
    assert (held["page slots"] > 0) == (case.placement.resident is not None)
