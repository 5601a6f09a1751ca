"""The README's commands and code run as they stand, on a little model."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from qsvd.cli import run
from qsvd.commands.demo import HELD_OUT
from tests.little import write_little

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
COMMANDS = [
    "plan",
    "train",
    "train",
    "generate",
    "report",
    "eval",
    "export",
    "quantize",
    "calibrate",
    "quantize",
    "export",
]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


@pytest.fixture(scope="module")
def little(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "little"
    write_little(path)
    return path


@pytest.fixture
def folder(tmp_path: Path, little: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which the hub ids of the README are a small model and a few pages as questions."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen").mkdir()
    (tmp_path / "Qwen" / "Qwen3-0.6B").symlink_to(little)
    (tmp_path / "MODEL").symlink_to(little)
    data = tmp_path / "openai" / "gsm8k:main"
    data.mkdir(parents=True)
    pages = [line[:90] for line in HELD_OUT.read_text(encoding="utf-8").splitlines() if len(line) > 120][:68]
    rows = [json.dumps({"question": page[:30], "answer": page[30:]}) for page in pages]
    for split, part in (("train", rows[:64]), ("test", rows[64:])):
        (data / f"{split}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")
    return tmp_path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks for an old name
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # the guide says that PEFT warns
def test_the_commands_and_the_code_that_loads_their_result_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line for block in blocks(README, "sh") for line in block.splitlines() if line.startswith("qsvd ")]
    assert [line.split()[1] for line in lines] == COMMANDS
    for line in lines:
        assert run(shlex.split(line, comments=True)[1:]) == 0, line
    assert (folder / "OUT" / "qsvd.json").is_file()
    assert (folder / "MERGED" / "model.safetensors").is_file()
    assert "objective: fisher" in (folder / "OUT275" / "allocation.txt").read_text()
    capsys.readouterr()
    exec(blocks(README, "python")[0], loaded := {})
    assert loaded["model"].split_record.method == "pissa"
    assert loaded["answer"] in capsys.readouterr().out
    for block in blocks(GUIDE, "python"):
        if "PeftModel" in block:
            exec(block, names := {})
            trained = [name for name, parameter in names["model"].named_parameters() if parameter.requires_grad]
            assert trained
            assert all(".lora_A." in name or ".lora_B." in name for name in trained)
            break
    else:
        pytest.fail("the guide shows no code that loads a quantized model with PEFT")


@pytest.mark.slow
def test_the_python_interface_in_the_guide_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = (block for block in blocks(GUIDE, "python") if "split_weight" in block)
    names = {"weight": torch.randn(300, 400, generator=torch.Generator().manual_seed(0))}
    exec(block, names)
    assert (folder / "OUT" / "qsvd.json").is_file()
    assert names["split"].rank == 16
    assert "WeightError(name='mine'" in capsys.readouterr().out


@pytest.mark.slow
def test_the_commands_for_an_edited_allocation_in_the_guide_run(folder: Path) -> None:
    (block,) = (block for block in blocks(GUIDE, "sh") if "qsvd allocate" in block)
    lines = block.splitlines()
    assert [line.split()[1] for line in lines] == ["allocate", "allocate", "plan", "quantize"]
    for line in lines:
        assert run(shlex.split(line, comments=True)[1:]) == 0, line
    assert "nf" in (folder / "bits.txt").read_text()
    assert (folder / "OUT" / "allocation.txt").is_file()
