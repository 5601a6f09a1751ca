"""Which layers are trained, judged by PEFT's own choice."""

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from qsvd.plan.targets import check_targets, is_target, target_names


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("q_proj", "my_q_proj", "o_proj")})
        self.mlp = nn.ModuleDict({"dense": nn.Linear(2, 2), "output": nn.ModuleDict({"dense": nn.Linear(2, 2)})})


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(12)])

    def forward(self, x):
        return x


MODULES = [path for path, module in Model().named_modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize(
    "names",
    [
        ["q_proj"],
        ["q_proj", "o_proj"],
        ["dense"],
        ["output.dense"],
        ["layers.1.self_attn.q_proj"],
        ["1.self_attn.q_proj"],
        ["self_attn.o_proj", "layers.11.mlp.dense"],
    ],
)
def test_a_list_of_names_stands_for_the_layers_that_peft_finds(names):
    model = get_peft_model(Model(), LoraConfig(r=1, target_modules=names))
    chosen = {path.removeprefix("base_model.model.") for path, m in model.named_modules() if hasattr(m, "lora_A")}
    assert {module for module in MODULES if is_target(module, target_names(names))} == chosen
    check_targets(names, MODULES)


def test_all_linear_and_nothing_are_all_layers():
    assert target_names(["all-linear"]) == target_names(["q_proj", "all-linear"]) == target_names([]) == ()
    assert all(is_target(module, ()) for module in MODULES)


def test_globs_and_commas():
    assert target_names(["q_proj,o_proj", "dense,"]) == ("q_proj", "o_proj", "dense")
    found = [module for module in MODULES if is_target(module, ["layers.1?.self_attn.*"])]
    assert found == [module for module in MODULES if module.startswith(("layers.10.self", "layers.11.self"))]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("q_prj", r"no quantized layer is called q_prj \(nearest: q_proj, o_proj\); give names such as q_proj, "),
        ("lm_head", r"no quantized layer is called lm_head; give names such as"),
        ("layers.*.self_atn.*", r"nearest: layers\.\*\.self_attn\..*\)"),
        ("Q_PROJ", "or all-linear$"),
    ],
)
def test_a_name_of_no_layer_gets_the_nearest_ones(name, said):
    with pytest.raises(ValueError, match=said):
        check_targets(["o_proj", name], MODULES)
