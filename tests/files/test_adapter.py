"""What is trained, on disk: safetensors and json read what was written, and what is damaged is refused."""

import dataclasses
import json
import shutil

import pytest
import safetensors
import safetensors.torch
import torch

from qsvd.errors import Damaged
from qsvd.files import adapter as adapter_folder
from qsvd.files.adapter import AdapterRecord, check_base, open_adapter, write_adapter
from qsvd.files.safetensors import read_tensor
from tests.sealed import opened, reseal

RECORD = AdapterRecord(
    base="/models/base",
    fingerprint="1f" * 32,
    method="edora",
    rank=8,
    alpha=16.5,
    dtype="bfloat16",
    seed=3,
    labels=("no", "yes, dé"),
    full=("score.weight",),
)


def parameters():
    generator = torch.Generator().manual_seed(0)
    return {
        "layers.0.q_proj.up": torch.randn(6, 3, generator=generator, requires_grad=True),
        "layers.0.q_proj.core": torch.randn(3, 3, generator=generator).bfloat16(),
        "score.weight": torch.randn(4, 2, generator=generator).T,  # not contiguous
    }


@pytest.fixture
def folder(tmp_path):
    write_adapter(tmp_path / "run" / "checkpoint", RECORD, parameters())
    return tmp_path / "run" / "checkpoint"


def rewrite(folder, **changed):
    """Change fields of the record; None takes one away."""

    def change(fields):
        fields |= changed
        for name in [name for name, value in changed.items() if value is None]:
            del fields[name]

    reseal(folder / "qsvd_adapter.json", change)


def test_safetensors_and_json_read_what_was_written(folder):
    assert {path.name for path in folder.iterdir()} == {"qsvd_adapter.json", "qsvd_adapter.safetensors"}
    fields = opened(folder / "qsvd_adapter.json")
    assert fields == dataclasses.asdict(RECORD) | {
        "labels": ["no", "yes, dé"],
        "full": ["score.weight"],
        "target_modules": [],
        "format": 4,
        "files": fields["files"],
    }
    with safetensors.safe_open(folder / "qsvd_adapter.safetensors", "pt") as file:
        assert file.metadata().items() >= {"format": "pt", "qsvd_base_fingerprint": RECORD.fingerprint}.items()
    found = safetensors.torch.load_file(folder / "qsvd_adapter.safetensors")
    written = parameters()
    assert set(found) == set(written)
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in written.items()
    )


def test_what_is_read_back_is_what_was_written(folder):
    adapter = open_adapter(folder)
    assert adapter.folder == folder
    assert adapter.record == RECORD
    written = parameters()
    assert set(adapter.tensors) == set(written)
    assert all(torch.equal(read_tensor(adapter.tensors[name]), tensor) for name, tensor in written.items())


def test_a_second_save_replaces_the_first(folder):
    again = dataclasses.replace(RECORD, labels=(), full=())
    write_adapter(folder, again, {"other": torch.ones(1)})
    adapter = open_adapter(folder)
    assert adapter.record == again
    assert set(adapter.tensors) == {"other"}


def test_the_record_is_written_last(folder, monkeypatch):
    """A save that is cut off leaves no folder that looks whole."""

    def full(*_):
        raise OSError("full")

    monkeypatch.setattr(adapter_folder, "write_stream", full)
    with pytest.raises(OSError, match="full"):
        write_adapter(folder.with_name("cut"), RECORD, parameters())
    assert list(folder.with_name("cut").iterdir()) == []


def test_a_folder_without_an_adapter_is_refused(folder):
    for place in (folder.parent, folder / "nowhere"):
        with pytest.raises(
            ValueError, match=r"holds no trained adapter \(no qsvd_adapter\.json\); give the folder of a run"
        ):
            open_adapter(place)


def test_a_record_without_its_parameters_is_refused(folder):
    (folder / "qsvd_adapter.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks qsvd_adapter\.safetensors; copy"):
        open_adapter(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        '"x"',
        "[" * 10**5,
        '{"format": 1}',
        '{"format": 1, "labels": [], "full": []}',
        b"\xff\xfe",
    ],
)
def test_a_damaged_record_is_refused(folder, text):
    (folder / "qsvd_adapter.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"qsvd_adapter\.json is (damaged|not valid JSON|a JSON|has format None)"):
        open_adapter(folder)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"method": None}, "damaged: method is missing$"),
        ({"full": 3, "rank": -1}, "damaged: rank is -1, not a whole number of 0 or more; full is 3, not a list$"),
        ({"format": None}, "has format None; this version"),
        ({"colour": "red"}, "damaged: colour is unknown$"),
        ({"dtype": "auto"}, "damaged: dtype 'auto' is neither float32 nor bfloat16$"),
    ],
)
def test_a_record_with_other_fields_is_refused(folder, changed, said):
    rewrite(folder, **changed)
    with pytest.raises(ValueError, match=rf"qsvd_adapter\.json.*{said}"):
        open_adapter(folder)


def test_another_format_is_named_whatever_else_it_has(folder):
    rewrite(folder, format=5, colour="red", method=None)
    with pytest.raises(ValueError, match=r"json has format 5; this version of qsvd reads formats 1 to 4"):
        open_adapter(folder)


def test_format_1_is_read_and_its_default_alpha_of_lora_was_16(folder):
    """As version 0.1.0 wrote it: with a scale of 16 / rank, whatever the rank."""
    fields = opened(folder / "qsvd_adapter.json") | {"format": 1, "method": "lora", "alpha": None}
    old = {name: fields[name] for name in fields if name not in ("target_modules", "dropout", "rslora", "own", "files")}
    (folder / "qsvd_adapter.json").write_text(json.dumps(old))
    record = open_adapter(folder).record
    assert (record.alpha, record.target_modules, record.dropout, record.rslora) == (16, (), 0, False)


@pytest.mark.parametrize("metadata", [None, {"format": "pt", "qsvd_base_fingerprint": "00"}])
def test_parameters_of_another_run_are_refused(folder, metadata):
    safetensors.torch.save_file({"a": torch.ones(1)}, folder / "qsvd_adapter.safetensors", metadata=metadata)
    with pytest.raises(Damaged, match="has lost its digests"):
        open_adapter(folder)
    rewrite(folder, format=3, files=None)  # of an older version
    with pytest.raises(ValueError, match=r"safetensors belongs to another run than qsvd_adapter\.json: their"):
        open_adapter(folder)


def test_parameters_of_another_run_on_the_same_model_are_refused(folder, tmp_path):
    write_adapter(tmp_path / "other", RECORD, {name: value + 1 for name, value in parameters().items()})
    shutil.copy(tmp_path / "other" / "qsvd_adapter.safetensors", folder)
    said = r"qsvd_adapter\.safetensors in .*checkpoint differ from what qsvd train wrote; copy the folder again$"
    with pytest.raises(Damaged, match=said):
        open_adapter(folder)


def test_a_template_of_another_run_is_refused(folder):
    write_adapter(folder, RECORD, parameters(), "{{ messages }}")
    assert open_adapter(folder).chat_template == "{{ messages }}"
    (folder / "chat_template.jinja").write_text("{{ message }}")
    with pytest.raises(Damaged, match=r"chat_template\.jinja in .*checkpoint differ from what qsvd train wrote"):
        open_adapter(folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(Damaged, match=r"lacks chat_template\.jinja, which qsvd train wrote; copy"):
        open_adapter(folder)


def test_cut_off_parameters_are_refused(folder):
    path = folder / "qsvd_adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"qsvd_adapter\.safetensors is truncated: 1 of"):
        open_adapter(folder)


def test_a_base_is_known_by_its_fingerprint_alone(folder):
    adapter = open_adapter(folder)
    check_base(adapter, folder.with_name("moved"), RECORD.fingerprint)
    said = (
        r"another quantized model than .*moved: .* \(1f1f1f1f1f1f and 1f1f1f1f1f1e\); it was trained on /models/base$"
    )
    with pytest.raises(ValueError, match=said):
        check_base(adapter, folder.with_name("moved"), "1f1f1f1f1f1e" + "1f" * 26)
