"""`qsvd plan OUT DATA` and `qsvd train OUT DATA --dry-run` print the same bytes."""

import shlex

import pytest

from qsvd.cli import parse, run
from tests.runs import text_rows, write_rows

MACHINE = ["--gpu", "8GB", "--host", "16GB"]
FLAGS = {
    "lora": [
        *("--method", "lora", "--rank", "8", "--dropout", "0.1", "--packing", "--steps", "7"),
        *("--target-modules", "q_proj", "v_proj", "--loss-on", "all", "--optimizer", "adamw"),
    ],
    "edora": [
        *("--method", "edora", "--lr", "1e-3", "--layer-major", "--held-out", "0", "--resident", "0"),
        *("--batch-size", "2", "--accumulate", "3", "--max-length", "24", "--epochs", "2.5"),
    ],
    "too large": ["--gpu", "500MB"],
    "16-bit dora": ["--method", "dora", "--no-double-quant"],
    "16-bit budget": ["--budget", "4bits", "--rank", "3"],
}
ROWS = {  # what shows that the flags reached the plan
    "lora": ["│ method                 │ lora", " tokens, packed into ", "│ optimizer              │ adamw "],
    "edora": ["│ max-length             │ 24", "blocks that stay on the GPU: 0 of"],
    "too large": ["Does not fit: "],
    "16-bit dora": ["dora is planned without stored components (rank 0)"],
    "16-bit budget": ["rank 3, ", "Only the total size of a budget is used"],
}


@pytest.mark.parametrize("name", FLAGS)
def test_a_plan_with_data_and_a_dry_run_print_the_same_bytes(tiny, tmp_path, monkeypatch, capsysbinary, name):
    monkeypatch.chdir(tmp_path)
    data = write_rows(tmp_path / "data.jsonl", text_rows())
    flags = [*MACHINE, *FLAGS[name]]
    code = 3 if name == "too large" else 0
    model = str(tiny.parent / "source" if name.startswith("16-bit") else tiny)
    assert run(["plan", model, data, *flags]) == code
    planned = capsysbinary.readouterr()
    assert run(["train", model, data, "--out", "RUN", *flags, "--dry-run"]) == code
    assert capsysbinary.readouterr() == planned
    assert planned.out.startswith((b"Fits: ", b"Does not fit: "))
    assert all(row.encode() in planned.out for row in ROWS.get(name, []))
    assert (b"qsvd quantize: " in planned.out) == name.startswith("16-bit")
    assert not (tmp_path / "RUN").exists()
    if code == 0:
        command = shlex.split(planned.err.decode().removeprefix("Next: "))
        assert parse(command[1:]) == parse(["train", model, data, "--out", "RUN", *flags])


def test_a_plan_on_a_cpu_has_the_memory_and_the_steps_of_the_run(tiny, tmp_path, capsys):
    data = write_rows(tmp_path / "data.jsonl", text_rows())
    assert run(["plan", str(tiny), data, "--device", "cpu", "--batch-size", "2"]) == 0
    shown = capsys.readouterr().out
    assert "of CPU memory, batch 2 x " in shown.splitlines()[0]
    assert "cpu, torch.float32" in shown


def test_a_run_that_starts_from_another_is_planned_with_the_adapter_of_that_one(tiny, tmp_path, capsys):
    data = write_rows(tmp_path / "data.jsonl", text_rows())
    own = ["--method", "lora", "--rank", "4"]
    train = ["--out", str(tmp_path / "first"), "--steps", "1", "--max-length", "16", "--device", "cpu"]
    assert run(["train", str(tiny), data, *train, *own]) == 0
    capsys.readouterr()
    for rows in ([data], []):
        assert run(["plan", str(tiny), *rows, *MACHINE, *own]) == 0
        expected = capsys.readouterr().out
        assert run(["plan", str(tiny), *rows, *MACHINE, "--init-from", str(tmp_path / "first")]) == 0
        assert capsys.readouterr().out == expected
    assert run(["plan", str(tiny.parent / "source"), "--init-from", str(tmp_path / "first")]) == 2
    assert "--init-from needs the quantized model of that run" in capsys.readouterr().err
