"""`qsvd export`: what it writes computes what was trained, it notices when not, and says what to do with the result."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

import qsvd
import qsvd.commands.export as command
from qsvd.cli import run as qsvd_command
from qsvd.commands.train import train
from qsvd.export import merged as export_merged
from qsvd.prepare.using import logits as check_export
from tests.commands.folders import files_of, tensors_of, without_progress
from tests.commands.trained_runs import LABELS, factors_of, trained_weights, write_run
from tests.export.cases import make_base, residual
from tests.runs import text_rows, training, write_rows
from tests.sealed import reseal

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT asks for an old name
]
WRONG = "the export does not compute what was trained: logits differ by"
FORMS = ("peft", "lora", "merged")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """source, out (its split) and run."""
    folder = make_base(tmp_path_factory.mktemp("made"))
    return SimpleNamespace(folder=folder, model=write_run(folder / "out", folder / "run"))


@pytest.fixture
def export(capsys):
    """The command: its exit code, stdout and stderr."""

    def run(source, form, out, *flags):
        arguments = ["export", source, "--to", form, "--out", out, *flags]
        code = qsvd_command([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return code, shown.out, without_progress(shown.err)

    return run


def scaled(model, folder):
    """PEFT's model with every B 10 % too large."""
    model = WITH_ADAPTER(model, folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1.1)
    return model


WITH_ADAPTER, WRITE_MERGED = command.with_adapter, command.write_merged


def write_swapped(model, folder, form):
    """A merged export in which two tensors of one shape have changed places."""
    is_new = not folder.exists()
    done = WRITE_MERGED(model, folder, form)
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    if not is_new:
        return done
    first, second = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
    tensors[first], tensors[second] = tensors[second], tensors[first]
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    reseal(folder / "qsvd_export.json", lambda record: record.pop("files"))
    return done


@pytest.mark.parametrize("form", FORMS)
def test_a_right_export_is_found_right(made, tmp_path, export, form):
    code, said, err = export(made.folder / "run", form, tmp_path / "out")
    assert (code, err) == (0, "")
    assert "checked: logits differ by at most" in said
    assert said.splitlines()[-1] == str(tmp_path / "out")


@pytest.mark.parametrize("form", FORMS)
def test_a_wrong_export_is_found_wrong_every_time(made, tmp_path, export, monkeypatch, form):
    monkeypatch.setattr(command, "with_adapter", scaled)
    monkeypatch.setattr(command, "write_merged", write_swapped)
    for _ in range(2 if form == "merged" else 1):  # the second time it is complete already
        code, said, err = export(made.folder / "run", form, tmp_path / "out")
        assert (code, said) == (2, "")
        assert err.startswith(f"qsvd: {WRONG}")
    if form == "merged":
        code, said, err = export(made.folder / "run", form, tmp_path / "out", "--no-check")
        assert (code, err) == (0, "")
        assert "checked" not in said


@pytest.mark.parametrize(("form", "file"), [("peft", "adapter_model"), ("merged", "model")])
def test_a_tensor_of_a_finished_export_that_was_damaged_is_named(made, tmp_path, export, form, file):
    assert export(made.folder / "run", form, tmp_path / "out", "--no-check")[0] == 0
    path = tmp_path / "out" / f"{file}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x7F  # exponent bits
    path.write_bytes(content)
    code, _, err = export(made.folder / "run", form, tmp_path / "out")
    assert (code, err.startswith(f"qsvd: {path} is damaged at ")) == (1, True), err


def test_a_check_that_does_not_fit_is_said(made, tmp_path, export, monkeypatch):
    monkeypatch.setattr(check_export, "_available_bytes", lambda: 1000)
    code, said, err = export(made.folder / "run", "peft", tmp_path / "out")
    assert (code, err) == (0, "")
    assert "not checked by logits: the model does not fit in memory as float32\n" in said
    assert "checked: " not in said


def test_memory_that_the_system_would_give_up_counts_as_free():
    found = check_export._available_bytes()
    assert 0 < found < 2**50
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    assert found == pytest.approx(available, rel=0.2), "other processes come and go between the two readings"


@pytest.mark.parametrize(("rank", "on_residual", "on_original"), [(1, 1, 8), (9, 16, 32)])
def test_the_commands_name_the_least_rank_that_vllm_allows(tmp_path, export, rank, on_residual, on_original):
    folder = make_base(tmp_path / "with space", rank=rank)
    write_run(folder / "out", folder / "run")
    out = tmp_path / "an export"
    _, said, _ = export(folder / "run", "peft", out, "--no-check")
    [line] = [line for line in said.splitlines() if line.startswith("vllm serve")]
    words = shlex.split(line)
    assert words[2] == str(folder / "out")
    assert words[words.index("--max-lora-rank") + 1] == str(on_residual)
    assert json.loads(words[words.index("--lora-modules") + 1]) == {"name": "trained", "path": str(out)}
    assert '"bnb_4bit_quant_storage": "uint8"' in words[words.index("--hf-overrides") + 1]
    assert "llama.cpp does not read bitsandbytes models: use --to merged for it" in said
    _, said, _ = export(folder / "run", "lora", tmp_path / "lora", "--no-check")
    assert f"vLLM: vllm serve '{folder / 'source'}' --enable-lora --max-lora-rank {on_original} " in said
    assert f"llama.cpp: python convert_lora_to_gguf.py --base '{folder / 'source'}' {tmp_path / 'lora'}" in said
    _, said, _ = export(folder / "run", "merged", tmp_path / "merged", "--no-check")
    assert f"vLLM: vllm serve {tmp_path / 'merged'}\n" in said
    assert f"llama.cpp: python convert_hf_to_gguf.py {tmp_path / 'merged'} --outtype bf16" in said


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A run with labels."""
    folder = make_base(tmp_path_factory.mktemp("classifier"), "BertModel")
    write_run(folder / "out", folder / "run", labels=LABELS)
    return folder / "run"


@pytest.mark.parametrize("form", FORMS)
def test_no_server_is_named_for_a_classifier(classifier, tmp_path, export, form):
    code, said, _ = export(classifier, form, tmp_path / "export")
    assert code == 0
    assert "checked: logits" in said
    assert "vLLM" not in said
    assert "llama.cpp" not in said


def test_a_decoder_that_classifies_finds_the_end_of_each_text_when_merged(tmp_path, export):
    folder = make_base(tmp_path)
    model = write_run(folder / "out", folder / "run", labels=LABELS)
    assert export(folder / "run", "merged", tmp_path / "export", "--dtype", "float32")[0] == 0
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "export")
    pad = model.config.pad_token_id
    tokens = torch.tensor([[5, 6, 7, 8], [9, 10, pad, pad]])
    mask = (tokens != pad).long()
    with torch.no_grad():
        found, wanted = (each(input_ids=tokens, attention_mask=mask).logits for each in (merged, model))
    rounding = (
        8 * 2.0**-24 * 64 * wanted.abs().max().item()
    )  # a sum of 64 terms, in the order of another matrix product
    assert (found - wanted).abs().max().item() <= rounding
    assert merged.config.id2label == {0: "neg", 1: "pos"}


def test_a_plain_result_is_exported_as_it_was_split(made, tmp_path, export):
    code, said, _ = export(made.folder / "out", "merged", tmp_path / "out", "--dtype", "float32")
    assert code == 0
    assert "100.0% of top tokens as trained" in said
    found = tensors_of(tmp_path / "out")
    assert found.keys() == tensors_of(made.folder / "source").keys()
    for module, (up, down) in factors_of(made.folder / "out").items():
        expected = residual(made.folder / "out", f"{module}.weight") + up @ down
        assert np.allclose(found[f"{module}.weight"].double().numpy(), expected, rtol=2.0**-20, atol=2.0**-24), module


def test_a_real_run_and_its_checkpoints_are_exported(language, tmp_path, export, capsys):
    base = language
    data = write_rows(tmp_path / "data.jsonl", text_rows())
    run = train(training(base, data, tmp_path / "run", steps=2, save_every=1, learning_rate=1e-3))
    earlier = run / "checkpoint-1"
    assert earlier.is_dir()
    assert export(earlier, "merged", tmp_path / "early-merged", "--no-check")[0] == 0
    assert export(run, "merged", tmp_path / "late-merged", "--no-check")[0] == 0
    model = qsvd.load(base, adapter=run)
    late, early = tensors_of(tmp_path / "late-merged"), tensors_of(tmp_path / "early-merged")
    for path, weight in trained_weights(base, run, model).items():
        expected = torch.from_numpy(weight)
        assert torch.allclose(late[f"{path}.weight"].double(), expected, rtol=2.0**-7, atol=2.0**-20), path
        assert not torch.equal(late[f"{path}.weight"], early[f"{path}.weight"]), "one more step moved it"
    capsys.readouterr()
    arguments = ["eval", base, run, earlier, tmp_path / "late-merged", "--data", data, "--json"]
    assert qsvd_command([str(argument) for argument in arguments]) == 0
    values = {one["model"]: one["perplexity"] for one in json.loads(capsys.readouterr().out)["models"]}
    assert values[str(run)] < values[str(base)], "trained on these very texts"
    assert values[str(tmp_path / "late-merged")] == pytest.approx(values[str(run)], rel=2.0**-7)


def test_an_export_that_was_stopped_goes_on(made, tmp_path, export, monkeypatch):
    flags = ("--shard-size", "100KB", "--no-check")
    assert export(made.folder / "run", "merged", tmp_path / "whole", *flags)[0] == 0
    write, written = export_merged.write_stream, []

    def stopping(path, *arguments):
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(path)
        write(path, *arguments)

    monkeypatch.setattr(export_merged, "write_stream", stopping)
    assert export(made.folder / "run", "merged", tmp_path / "out", *flags)[0] == 130
    times = {path: path.stat().st_mtime_ns for path in written}
    assert not (tmp_path / "out" / "config.json").exists(), "nothing loads half an export"
    monkeypatch.undo()
    assert export(made.folder / "run", "merged", tmp_path / "out", *flags)[0] == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert times == {path: path.stat().st_mtime_ns for path in written}, "what was there was not written again"


def test_a_folder_with_something_else_in_it_is_left_alone(made, tmp_path, export):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    for form in FORMS:
        code, _, err = export(made.folder / "run", form, tmp_path / "mine")
        assert code == 2
        assert err.endswith("mine is not empty and was not written by qsvd export; give --out another folder\n")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_another_export_in_the_folder_is_refused(made, tmp_path, export):
    assert export(made.folder / "run", "peft", tmp_path / "out", "--no-check")[0] == 0
    code, _, err = export(made.folder / "run", "merged", tmp_path / "out")
    assert code == 2
    assert "out was written with other options: " in err
    assert 'to "peft" there, "merged" now' in err


def test_a_base_that_was_moved_is_named_with_base(tmp_path, export):
    folder = make_base(tmp_path)
    write_run(folder / "out", folder / "run")
    (folder / "out").rename(folder / "moved")
    code, _, err = export(folder / "run", "merged", tmp_path / "export")
    assert (code, err) == (
        2,
        f"qsvd: {folder / 'run'} was trained on {folder / 'out'}, which does not exist; give --base with its "
        "new folder\n",
    )
    assert export(folder / "run", "merged", tmp_path / "export", "--base", folder / "moved", "--no-check")[0] == 0
    other = make_base(tmp_path / "other", rank=2)
    code, _, err = export(folder / "run", "merged", tmp_path / "export2", "--base", other / "out")
    assert code == 2
    assert "run was trained on another quantized model than" in err
    assert not (tmp_path / "export2").exists()


def test_without_the_original_the_recorded_error_is_stated_and_nothing_checked(tmp_path, export):
    folder = make_base(tmp_path)
    write_run(folder / "out", folder / "run")
    _, measured, _ = export(folder / "run", "lora", tmp_path / "first", "--no-check")
    (folder / "source").rename(folder / "elsewhere")
    code, said, _ = export(folder / "run", "lora", tmp_path / "second")
    assert code == 0
    assert f"not checked by logits: {folder / 'source'} is not on this machine; give --original" in said
    stated = [line for line in said.splitlines() if "relative error" in line]
    assert stated == [
        line.replace("measured", "as qsvd quantize recorded it") for line in measured.splitlines() if "relative" in line
    ]
    elsewhere = ("--original", folder / "elsewhere", "--no-check")
    assert export(folder / "run", "lora", tmp_path / "third", *elsewhere)[0] == 0
    code, _, err = export(folder / "run", "lora", tmp_path / "fourth", "--original", folder / "out")
    assert code == 2
    assert "is not the model that" in err


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("source", "is a 16-bit model, and needs no export; give a run of qsvd train, or a quantized model"),
        ("nothing", "nothing here; give a run of qsvd train, or a quantized model"),
        (".", "or a run of qsvd train; give the folder of a model, or a Hub id"),
    ],
)
def test_what_is_no_run_is_refused(made, tmp_path, export, source, sentence):
    code, said, err = export(made.folder / source, "merged", tmp_path / "out")
    assert (code, said) == (2, "")
    assert err.endswith(f"{sentence}\n")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_name_that_might_be_on_the_hub_is_not_looked_for(tmp_path, export, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = export("some/run", "merged", tmp_path / "out")
    assert (code, err) == (
        2,
        "qsvd: no folder some/run here; give a run of qsvd train, or a quantized model\n",
    )


def test_a_shard_size_that_is_none_is_refused_first(tmp_path, export):
    code, _, err = export(tmp_path / "nothing", "merged", tmp_path / "out", "--shard-size", "many")
    assert code == 2
    assert "many" in err
