"""The planned bytes of what a training run holds are those of its tensors, item by item, to the byte."""

import pytest
import torch

from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.planned import planned_base
from qsvd.adapters.start import new_record
from qsvd.checkpoint.read_split import open_split
from qsvd.plan.activations import Batch
from qsvd.plan.memory import Limits
from qsvd.plan.pages import EVERYTHING
from qsvd.plan.training import Training, plan_training
from tests.plan.counting import held_after_a_step, llama_base
from tests.runs import language_base

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")

WIDE = {"hidden_size": 128, "intermediate_size": 320, "tie_word_embeddings": False}
ODD = {"hidden_size": 72, "intermediate_size": 200, "num_attention_heads": 6, "num_key_value_heads": 2}
CASES = {  # base, method, trained rank, adapter dtype, optimizer
    "embedded rank 0, lora, adamw": ("embedded 0", "lora", 8, "float32", "adamw"),
    "embedded rank 16, pissa, 8 bits": ("embedded 16", "pissa", None, "float32", "adamw_8bit"),
    "embedded rank 64, edora, paged 8 bits": ("embedded 64", "edora", 48, "float32", "paged_adamw_8bit"),
    "embedded rank 16, lora beside it, bfloat16": ("embedded 16", "lora", 4, "bfloat16", "adamw"),
    "wide and untied, plain scales, paged 32 bits": ("wide", "pissa", None, "float32", "paged_adamw_32bit"),
    "odd sizes, lora, bfloat16 in 8 bits": ("odd", "lora", 40, "bfloat16", "adamw_8bit"),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A split model by its name; made when it is first asked for."""
    home = tmp_path_factory.mktemp("bases")

    def base(name):
        folder = home / name.replace(" ", "-")
        if name == "wide":
            return llama_base(folder, 8, double_quant=False, **WIDE)
        if name == "odd":
            return llama_base(folder, 4, **ODD)
        return language_base(folder, rank=int(name.removeprefix("embedded ")))

    return base


def planned_items(base, *, method, rank, adapter_dtype, optimizer):
    split = open_split(base)
    record = new_record(split, AdapterOptions(method, rank=rank, dtype=adapter_dtype))
    model = planned_base(split, record, torch.float32)
    batch = Batch(24, 2, is_masked=False, checkpointing=True, device="cpu")
    plan = plan_training(model, Training(batch, 2, optimizer), EVERYTHING, Limits())
    return {item.name: item.host for item in plan.items}


@pytest.mark.parametrize("case", CASES)
def test_a_step_holds_what_was_planned(bases, tmp_path, case):
    name, method, rank, adapter_dtype, optimizer = CASES[case]
    base = bases(name)
    changes = {"optimizer": optimizer, "batch_size": 2, "accumulate": 2, "gradient_checkpointing": True}
    held = held_after_a_step(base, tmp_path, method=method, rank=rank, adapter_dtype=adapter_dtype, changes=changes)
    planned = planned_items(base, method=method, rank=rank, adapter_dtype=adapter_dtype, optimizer=optimizer)
    assert {item: planned.get(item, 0) for item in held} == held
    assert held["trained parameters"] > 0
    assert held["optimizer state"] > 0
