"""A LoRA on the original of a model with frozen experts, judged by plain PEFT on plain transformers."""

import json
import shutil
from collections import Counter

import peft
import pytest
import safetensors.torch
import torch
import transformers

import qsvd
from qsvd.adapters.model import split_linears
from qsvd.commands import quantize
from qsvd.export.trained import TrainedModel
from qsvd.files.split_folder import SplitFolder, open_split
from tests.adapters.results import in_float32
from tests.checkpoints import write_checkpoint
from tests.export.cases import IDS, assert_same_outputs, dense_model, outputs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT 0.21 asks for it
]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    architecture = "Glm4MoeForCausalLM"
    folder = tmp_path_factory.mktemp(architecture)
    write_checkpoint(folder / "source", architecture, dtype=torch.float32)
    qsvd.quantize(folder / "source", out=folder / "out", rank=4, expert_rank=2, iterations=1, device="cpu")
    return folder


def write_run(folder, run, targets):
    """A run whose trained layers have moved, and the change of each, float64."""
    model = qsvd.load(folder / "out", device="cpu", options=qsvd.AdapterOptions("pissa", target_modules=targets))
    stored, changes = open_split(folder / "out"), {}
    generator = torch.Generator().manual_seed(0)
    for path, linear in split_linears(model):
        moving = [parameter for parameter in linear.adapter.parameters() if parameter.requires_grad]
        with torch.no_grad():
            for parameter in moving:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
            if moving:
                up, down = (factor.double() for factor in linear.adapter.factors())
                old_up, old_down = (factor.double() for factor in stored.factors(linear.name))
                changes[path] = (up @ down - old_up @ old_down).numpy()
    model.save_pretrained(run)
    return changes


def test_plain_peft_adds_the_change_to_the_attention_of_the_original(quantized, tmp_path, monkeypatch):
    changes = write_run(quantized, tmp_path / "run", ("q_proj", "k_proj", "v_proj", "o_proj"))
    assert len(changes) == 8
    options, reads = {"to": "lora", "original": str(quantized / "source")}, Counter()
    real = TrainedModel.read
    monkeypatch.setattr(TrainedModel, "read", lambda model, name: reads.update([name]) or real(model, name))
    done = qsvd.export(tmp_path / "run", out=tmp_path / "x", check=False, **options)
    assert {*reads.values()} == {2}, "once to check, once to write"
    shutil.move(quantized / "source", quantized / "elsewhere")  # then errors are those that were recorded
    reads.clear()
    assert qsvd.export(tmp_path / "run", out=tmp_path / "y", to="lora").checked is None
    shutil.move(quantized / "elsewhere", quantized / "source")
    assert {reads[name] for name in reads if ".experts." in name} == {1}
    assert same_tensors(tmp_path / "x", tmp_path / "y")
    shutil.rmtree(tmp_path / "x")
    done = qsvd.export(tmp_path / "run", out=tmp_path / "x", **options)
    assert done.checked is not None
    source = transformers.AutoModelForCausalLM.from_pretrained(quantized / "source", dtype=torch.float64)
    moved = {path: source.get_submodule(path).weight.numpy(force=True) + change for path, change in changes.items()}
    plain = transformers.AutoModelForCausalLM.from_pretrained(quantized / "source", dtype=torch.float32)
    found = peft.PeftModel.from_pretrained(plain, tmp_path / "x")
    exact, single = (
        outputs(dense_model(quantized / "source", moved, dtype, experts_implementation="eager"))
        for dtype in (torch.float64, torch.float32)
    )
    assert_same_outputs(found, exact, (single - exact).abs().max().item())
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(changes)
    assert len(safetensors.torch.load_file(tmp_path / "x" / "adapter_model.safetensors")) == 16


def same_tensors(*folders):
    one, other = (safetensors.torch.load_file(folder / "adapter_model.safetensors") for folder in folders)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def assert_opens_whole(out, architecture):
    ours = qsvd.load(out, device="cpu", dtype=torch.float32)(input_ids=IDS).logits
    plain = getattr(transformers, architecture).from_pretrained(out, dtype=torch.float32)
    theirs = in_float32(plain)(input_ids=IDS).logits
    assert (theirs - ours).abs().max() <= 1e-5 * ours.abs().max()


def test_trained_experts_are_refused_before_weights_are_read(quantized, tmp_path, monkeypatch):
    write_run(quantized, tmp_path / "run", ("*",))
    monkeypatch.setattr(SplitFolder, "residual", None)
    monkeypatch.setattr(SplitFolder, "factors", None)
    message = r"experts were trained \(model\.layers\..* no LoRA for one expert of a stack; use --to merged"
    with pytest.raises(qsvd.BadInput, match=message):
        qsvd.export(tmp_path / "run", out=tmp_path / "x", to="lora", original=str(quantized / "source"))
    assert not (tmp_path / "x").exists()


def test_beside_experts_in_16_bits_a_run_is_for_peft_where_peft_puts_every_layer_in_its_place(tmp_path):
    write_checkpoint(tmp_path / "source", "Glm4MoeForCausalLM", dtype=torch.float32)
    for name, excluded in (("attention", ("*.mlp.*",)), ("all", ("*.experts.*",))):
        folder, options = tmp_path / name, {"rank": 4, "iterations": 1, "device": "cpu"}
        qsvd.quantize(tmp_path / "source", out=folder / "out", exclude=excluded, **options)
        write_run(folder, folder / "run", ())
    done = qsvd.export(tmp_path / "attention" / "run", out=tmp_path / "peft", to="peft")
    assert_opens_whole(tmp_path / "attention" / "out", "Glm4MoeForCausalLM")
    assert done.checked is not None, "plain PEFT computes what was trained"
    message = r"PEFT would put the LoRA of model\.layers\.0\.mlp\..* on the experts, since"
    with pytest.raises(qsvd.BadInput, match=message):
        qsvd.export(tmp_path / "all" / "run", out=tmp_path / "refused", to="peft")
    assert not (tmp_path / "refused").exists()


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # that PEFT itself made
@pytest.mark.parametrize(
    ("architecture", "options", "opens"),
    [
        ("MixtralForCausalLM", {"rank": 4}, True),
        ("Glm4MoeForCausalLM", {"rank": 4}, False),
        ("Glm4MoeForCausalLM", {"rank": 0}, True),
        ("Glm4MoeForCausalLM", {"budget": "6bits", "exclude": ("*.experts.*", "*.layers.1.*")}, False),
    ],
)
def test_out_opens_rightly_or_is_refused_with_the_reason(tmp_path, architecture, options, opens, capsys):
    widths = {"moe_intermediate_size": 64} if "Glm" in architecture else {}  # see BLOCK in qsvd/report/readme.py
    write_checkpoint(tmp_path / "source", architecture, dtype=torch.float32, **widths)
    out, settings = tmp_path / "out", {"iterations": 1, "device": "cpu", "exclude": ("*.experts.*",)} | options
    quantize.main(qsvd.Quantize(str(tmp_path / "source"), out=out, **settings))
    text, said = (out / "README.md").read_text(), capsys.readouterr().err
    if opens:
        assert_opens_whole(out, architecture)
        return
    message = r"^PEFT would put the components of model\.layers\.0.* on the experts, .*: open it with qsvd\.load\(OUT\)"
    with pytest.raises(qsvd.BadInput, match=message):
        getattr(transformers, architecture).from_pretrained(out)
    assert "from_pretrained" not in text
    assert "only qsvd can open: PEFT would put the components" in text
    assert ("warning: PEFT would put the components of" in said) == ("rank" in options)
    shutil.copytree(out, tmp_path / "plain")
    assert qsvd.load(out, device="cpu")(input_ids=IDS).logits.isfinite().all()
    plain = getattr(transformers, architecture).from_pretrained(tmp_path / "source")
    with pytest.warns(UserWarning, match="missing adapter keys .*experts"):
        peft.PeftModel.from_pretrained(plain, out)


def test_layers_that_peft_would_take_for_experts_are_refused(quantized, tmp_path):
    changes = write_run(quantized, tmp_path / "run", ())  # all but experts
    options = {"out": tmp_path / "x", "to": "lora", "original": str(quantized / "source")}
    taken = [path for path in changes if ".mlp." in path]
    assert len(taken) == 6  # of the dense block, and of the shared expert
    message = r"PEFT would put the LoRA of model\.layers\.0\.mlp\..* on the experts, since"
    with pytest.raises(qsvd.BadInput, match=message):
        qsvd.export(tmp_path / "run", **options)
    assert not (tmp_path / "x").exists()
