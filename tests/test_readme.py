"""The README's commands and code run as they stand, on the embedded model, and the changelog knows this version."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

import qsvd
from qsvd.cli import run
from qsvd.commands.demo import HELD_OUT, MODEL

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which path/or/hub-id is the embedded model, and data.jsonl and test.jsonl are a few pages."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path" / "or").mkdir(parents=True)
    (tmp_path / "path" / "or" / "hub-id").symlink_to(MODEL)
    pages = [line[:200] for line in HELD_OUT.read_text(encoding="utf-8").splitlines() if len(line) > 60][:132]
    for name, part in (("data.jsonl", pages[:128]), ("test.jsonl", pages[128:])):
        (tmp_path / name).write_text("".join(f"{json.dumps({'text': page})}\n" for page in part))
    return tmp_path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks for an old name
def test_the_commands_and_the_code_that_loads_their_result_run(folder: Path) -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("qsvd ")]
    assert len(lines) == 12
    for line in lines:
        assert run(shlex.split(line, comments=True)[1:]) == 0, line
    assert (folder / "OUT" / "qsvd.json").is_file()
    assert "objective: fisher" in (folder / "OUT275" / "allocation.txt").read_text()
    assert (folder / "bits.txt").is_file()
    exec(blocks("python")[2], loaded := {})
    assert loaded["model"].split_record.method == "pissa"
    names: dict = {}
    exec(blocks("python")[0], names)
    trained = [name for name, parameter in names["model"].named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)


@pytest.mark.slow
def test_the_python_interface_runs(folder: Path, capsys: pytest.CaptureFixture) -> None:
    weight = torch.randn(300, 400, generator=torch.Generator().manual_seed(0))
    names = {"weight": weight}
    exec(blocks("python")[1], names)
    assert (folder / "OUT" / "qsvd.json").is_file()
    assert names["split"].rank == 16
    assert "WeightError(name='mine'" in capsys.readouterr().out


def test_the_changelog_has_this_version() -> None:
    assert f"## {qsvd.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_every_file_that_the_readme_links_to_is_there() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link.partition("#")[0]).exists()] == []
