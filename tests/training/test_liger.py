"""When Liger's kernels are used, and what of a model they replace, with a stand-in for the package."""

import sys

import pytest
import torch
from transformers.models.llama import modeling_llama

import qsvd
from qsvd.prepare.train import prepare_train
from qsvd.training import liger
from tests.runs import training

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PACKAGE = """
from transformers.models.llama import modeling_llama

def _apply_liger_kernel_to_instance(model, **chosen):
    modeling_llama.LlamaMLP = None
    for layer in model.model.layers:
        layer.mlp.forward = lambda x: x * 0
    model.told = chosen
"""


@pytest.fixture
def _installed(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("liger_kernel")]:
        monkeypatch.delitem(sys.modules, name)
    files = {
        "liger_kernel/__init__.py": "",
        "liger_kernel/transformers.py": PACKAGE,
        "liger_kernel-9.8.7.dist-info/METADATA": "Metadata-Version: 2.1\nName: liger-kernel\nVersion: 9.8.7\n",
    }
    for name, text in files.items():
        (tmp_path / "site" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield
    for name in [name for name in sys.modules if name.startswith("liger_kernel")]:
        del sys.modules[name]


@pytest.mark.usefixtures("_installed")
def test_a_line_says_that_they_are_used_on_a_gpu_for_a_known_family(language, texts, tmp_path, monkeypatch):
    (line,) = liger.said_of_liger("llama", GPU)
    assert line.startswith("Kernels: norms and gated units are those of liger-kernel 9.8.7, since it is installed")
    assert liger.said_of_liger("llama", CPU) == liger.said_of_liger("mixtral", GPU) == []
    monkeypatch.setattr(liger, "has_liger", lambda kind, _: kind == "llama")
    assert line in prepare_train(training(language, texts, tmp_path / "run")).first_lines


@pytest.mark.usefixtures("_installed")
def test_a_run_has_them_and_other_models_of_the_family_do_not(language, texts, tmp_path, monkeypatch):
    alone = qsvd.load(language, device="cpu")
    liger.use_liger(alone)
    assert not hasattr(alone, "told")  # on a CPU
    kept = modeling_llama.LlamaMLP
    monkeypatch.setattr(liger, "has_liger", lambda *_: True)
    seen = []
    used = liger.use_liger
    monkeypatch.setattr("qsvd.commands.train.use_liger", lambda model: used(model) or seen.append(model))
    qsvd.train(training(language, texts, tmp_path / "run", steps=1, any_start=True))
    assert seen[0].told == {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}
    assert (seen[0].model.layers[0].mlp(torch.ones(1, 1, 256)) == 0).all()
    assert modeling_llama.LlamaMLP is kept


def test_without_the_package_nothing_is_said(monkeypatch):
    monkeypatch.setattr(liger, "find_spec", lambda _: None)
    assert liger.said_of_liger("llama", GPU) == []
