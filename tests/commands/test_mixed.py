"""A base whose weights differ in bits and ranks is split, loaded, paged, exported and reported like any other."""

import copy
import json
import math

import peft
import pytest
import safetensors.torch
import torch
import transformers

import qsvd
from qsvd.adapters.linear import SplitLinear
from qsvd.adapters.model import split_linears, trained
from qsvd.cli import run
from qsvd.commands.quantize import quantize_run
from qsvd.files.split_folder import open_split
from qsvd.memory.items import Placement
from qsvd.numerics.names import codec_named
from qsvd.prepare.quantize import prepare_quantize
from qsvd.training.trainer import stored_components
from tests.adapters import results
from tests.adapters.results import IDS, ROUNDINGS, distance, in_float32, outputs
from tests.checkpoints import write_checkpoint, write_tokenizer
from tests.commands.folders import components_of, files_of, tensors_of
from tests.mixed import CODECS, RANKS, mixed_base, modules_of, plain_model, residual, write_table
from tests.runs import text_rows, write_rows
from tests.stops import StopAfter, Stopped

WIDTHS = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}  # blocks of 128 cross rows
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks for an old name


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return mixed_base(tmp_path_factory.mktemp("mixed"), shard_size="100KB", **WIDTHS)


@pytest.fixture(scope="module")
def plain(out):
    return plain_model(out)


def weights_of(out):
    return json.loads((out / "qsvd.json").read_text())["weights"]


def assert_as_exact_as_float32(model, plain):
    exact = outputs(plain)
    rounding = ROUNDINGS * distance(outputs(copy.deepcopy(plain).float()), exact)
    assert rounding > 0
    assert distance(outputs(model), exact) <= rounding


def test_every_weight_has_the_codec_and_the_rank_of_its_line(out):
    chosen = {weight["module"]: (weight["codec"], weight["rank"]) for weight in weights_of(out).values()}
    modules = modules_of(out.parent / "source")
    assert chosen == {m: (CODECS[n % len(CODECS)], RANKS[n % len(RANKS)]) for n, m in enumerate(modules)}
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "qsvd"
    assert {path: codec for codec, paths in config["codecs"].items() for path in paths} == {
        module: codec for module, (codec, _) in chosen.items()
    }
    adapter = json.loads((out / "adapter_config.json").read_text())
    assert set(adapter["target_modules"]) == {module for module, (_, rank) in chosen.items() if rank}
    assert adapter["r"] == adapter["lora_alpha"] == 4
    again = qsvd.Quantize(str(out.parent / "source"), out=out.parent / "x", allocation=out / "allocation.txt")
    assert {m: c.rank for m, c in prepare_quantize(again).resolved.choices.items()} == {
        m: r for m, (_, r) in chosen.items()
    }


def test_the_files_hold_the_bytes_that_a_budget_counts(out):
    stored, factors = tensors_of(out), components_of(out)
    for weight in weights_of(out).values():
        module = weight["module"]
        held = sum(t.nbytes for key, t in stored.items() if key.rpartition(".")[0] == module)
        held += sum(t.nbytes for key, t in factors.items() if f".{module}.lora_" in key)
        counted = codec_named(weight["codec"]).num_bytes(tuple(weight["shape"])) + 2 * weight["rank"] * sum(
            weight["shape"]
        )
        assert held == counted
        assert held / math.prod(weight["shape"]) < 2.6, "16-bit weights would be 2"


@pytest.mark.parametrize("method", ["pissa", "lora", "edora"])
def test_outputs_are_those_of_the_dense_weights(out, plain, method):
    model = qsvd.load(out, options=qsvd.AdapterOptions(method))
    assert_as_exact_as_float32(model, plain)
    has_components = {w["module"] for w in weights_of(out).values() if w["rank"] or method == "lora"}
    assert {name.rpartition(".")[0] for name in trained(model)} == has_components


def test_transformers_and_peft_load_it_once_qsvd_is_imported(out, plain):
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert not any(isinstance(module, SplitLinear) for module in model.modules())
    assert_as_exact_as_float32(in_float32(model), plain)


@pytest.mark.parametrize(("method", "pages"), [("pissa", "host"), ("edora", "disk")])
def test_weights_that_visit_give_the_bits_of_weights_that_stay(out, method, pages):
    found = []
    for placement in (Placement(None), Placement(1, pages)):
        model = qsvd.load(out, options=qsvd.AdapterOptions(method), device="cpu", placement=placement).train()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in trained(model).values())])
    assert len(found[0]) == len(found[1]) > 2
    assert all(map(torch.equal, *found))


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(out):
    table = out.parent / "table.txt"
    options = qsvd.Quantize(
        str(out.parent / "source"), out=out.parent / "stopped", iterations=1, shard_size="100KB", allocation=table
    )
    with pytest.raises(Stopped):
        quantize_run(prepare_quantize(options), StopAfter(5))
    write_table(out.parent / "other.txt", modules_of(out.parent / "source"), ranks=(2,))
    with pytest.raises(ValueError, match="was written with other options: allocation"):
        qsvd.quantize(qsvd.Quantize(**(vars(options) | {"allocation": out.parent / "other.txt"})))
    qsvd.quantize(options)
    kept = {
        name: content for name, content in files_of(out).items() if name.endswith((".safetensors", "allocation.txt"))
    }
    assert kept.items() <= files_of(options.out).items()
    assert len(kept) == 4


def exported(source, form, folder, capsys):
    assert run(["export", str(source), "--to", form, "--out", str(folder)]) == 0
    return capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # PEFT replaces the components
def test_what_was_trained_is_exported(out, capsys, tmp_path):
    assert qsvd.load(out).split_record.method == "lora", "which trains beside weights that store nothing too"
    model = qsvd.load(out, options=qsvd.AdapterOptions("pissa"))
    with torch.no_grad():
        for number, parameter in enumerate(trained(model).values()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    model.save_pretrained(tmp_path / "run")
    saved = safetensors.torch.load_file(tmp_path / "run" / "qsvd_adapter.safetensors")
    for form in ("merged", "peft", "lora"):
        shown = exported(tmp_path / "run", form, tmp_path / form, capsys)
        assert "checked: logits differ by at most" in shown
        assert ("mixed bits: PEFT loads it after import qsvd" in shown) == (form == "peft")
        assert "bitsandbytes" not in shown
    merged, stored = tensors_of(tmp_path / "merged"), tensors_of(out)
    source = tensors_of(out.parent / "source")
    assert merged.keys() == source.keys()
    for weight in weights_of(out).values():
        module, shape = weight["module"], weight["shape"]
        dense = torch.from_numpy(residual(weight["codec"], module, shape, stored))
        if weight["rank"]:
            dense = dense + saved[f"{module}.up"].double() @ saved[f"{module}.down"].double()
        half_ulp = dense.abs() * 2.0**-8 + 1e-6  # of bfloat16, and of sums in float32
        assert ((merged[f"{module}.weight"].double() - dense).abs() <= half_ulp).all()
    adapted = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), tmp_path / "peft"
    )
    difference = distance(outputs(adapted), outputs(model))
    assert difference < 1e-4 * outputs(model).std()


def test_report_and_readme_say_what_it_is(out, capsys):
    assert run(["report", str(out)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "NF2, NF3, NF4 and NF8 residuals of" in shown
    assert "components of ranks 0 to 4" in shown
    readme = (out / "README.md").read_text()
    assert "import qsvd  # registers the quantization method" in readme
    assert "--quantization bitsandbytes" not in readme


def test_a_table_of_bitsandbytes_own_codec_is_written_in_its_layout(tmp_path):
    source = tmp_path / "source"
    write_checkpoint(source, hidden_size=64, intermediate_size=128)  # bitsandbytes decodes other widths wrongly
    write_table(tmp_path / "table.txt", modules_of(source), codecs=("nf4+dq",))
    options = {"iterations": 1, "allocation": tmp_path / "table.txt"}
    out = qsvd.quantize(qsvd.Quantize(str(source), out=tmp_path / "out", **options))
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    model = in_float32(model)
    plain = results.plain_model(out)
    exact = outputs(plain)
    assert distance(outputs(model), exact) <= ROUNDINGS * distance(outputs(plain.bfloat16()), exact)
    assert distance(outputs(qsvd.load(out)), exact) < 1e-4 * exact.std()


def test_an_allocation_that_does_not_fit_is_refused_before_any_work(out, tmp_path, capsys):
    source, table = str(out.parent / "source"), tmp_path / "table.txt"
    flags = ["quantize", source, "--out", str(tmp_path / "out"), "--allocation", str(table)]
    assert run(flags) == 2
    assert "--allocation" in capsys.readouterr().err
    table.write_text("model.layers.0.self_attn.z_proj nf5 1\nmodel.layers.0.self_attn.q_proj nf5-64-fp32 1\n")
    assert run(flags) == 2
    shown = capsys.readouterr().err
    assert "line 1: model.layers.0.self_attn.z_proj is not a weight to split" in shown
    assert "line 2: codec 'nf5-64-fp32'" in shown
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def partly(tmp_path_factory):
    """A base with a tokenizer, whose first weight, and others, store nothing."""
    folder = tmp_path_factory.mktemp("partly")
    write_checkpoint(folder / "source", **(WIDTHS | {"vocab_size": 4096, "num_hidden_layers": 1}))
    write_tokenizer(folder / "source")
    write_table(folder / "table.txt", modules_of(folder / "source"), ranks=(0, 3))
    options = {"iterations": 1, "allocation": folder / "table.txt"}
    return qsvd.quantize(qsvd.Quantize(str(folder / "source"), out=folder / "out", **options)).path


@pytest.mark.parametrize("method", ["pissa", "edora", "lora"])
def test_a_run_trains_what_is_stored_and_leaves_the_rest(partly, tmp_path, method):
    """Through the command."""
    base = partly
    data = write_rows(tmp_path / "data.jsonl", text_rows())
    run_folder = tmp_path / "run"
    flags = ["--method", method, "--steps", "1", "--max-length", "16", "--resident", "0.5", "--any-start"]
    assert run(["train", str(base), str(data), "--out", str(run_folder), *flags]) == 0
    names = safetensors.torch.load_file(run_folder / "qsvd_adapter.safetensors").keys()
    ranks = {weight["module"]: weight["rank"] for weight in weights_of(base).values()}
    assert {name.rpartition(".")[0] for name in names} == {m for m, rank in ranks.items() if rank or method == "lora"}
    assert run(["export", str(run_folder), "--to", "merged", "--out", str(tmp_path / "merged")]) == 0


@pytest.mark.parametrize("method", ["pissa", "edora", "lora"])
def test_stored_components_take_the_place_of_every_adapter_for_a_while(out, plain, method):
    model = qsvd.load(out, options=qsvd.AdapterOptions(method))
    before = [linear.adapter for _, linear in split_linears(model)]
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(1.0)
    with stored_components(model, open_split(out)):
        assert_as_exact_as_float32(model, plain)
    assert [linear.adapter for _, linear in split_linears(model)] == before
    assert distance(outputs(model), outputs(plain)) > 0.1
