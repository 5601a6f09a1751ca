"""The commands of docs/walks.md run in their order, on small models under the names of the large ones."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from qsvd.cli import run
from qsvd.commands.demo import HELD_OUT
from tests.little import write_little

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "walks.md").read_text(encoding="utf-8")
WALKS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE))
DENSE = ("Qwen/Qwen3-8B", "meta-llama/Llama-3.1-70B-Instruct")
EXPERTS = "Qwen/Qwen3-30B-A3B"
LONGEST = 8192  # tokens, of the recipes
SMALL = {  # of a mixture of experts
    "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "num_hidden_layers": 2, "num_experts": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2,
}  # fmt: skip


def commands(walk: str) -> list[list[str]]:
    """The commands of qsvd in a walk."""
    found = re.findall(r"```sh\n(.*?)```", WALKS[walk], flags=re.DOTALL)
    lines = [line for block in found for line in block.replace("\\\n", "").splitlines() if line.startswith("qsvd ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models in folders that are named as the Hub ids of the page, data, and the recipes."""
    folder = tmp_path_factory.mktemp("models")
    for name in DENSE:
        write_little(folder / name, max_position_embeddings=LONGEST)
    write_little(folder / EXPERTS, "Qwen3Moe", **SMALL, max_position_embeddings=LONGEST, tie_word_embeddings=False)
    pages = [line[:120] for line in HELD_OUT.read_text(encoding="utf-8").splitlines() if len(line) > 120][:20]
    rows = [json.dumps({"question": page[:60], "answer": page[60:]}) for page in pages]
    (folder / "data.jsonl").write_text("\n".join(rows[:16]) + "\n", encoding="utf-8")
    (folder / "test.jsonl").write_text("\n".join(rows[16:]) + "\n", encoding="utf-8")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    return folder


def without_gpu(recipe: str) -> str:
    """A copy of a recipe without the limit of GPU memory, which `qsvd train` refuses where there is no GPU."""
    file = Path(recipe)
    copy = file.with_name(f"cpu-{file.name}")
    copy.write_text(re.sub(r"^gpu: .*\n", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE))
    return str(copy)


@pytest.mark.slow
@pytest.mark.parametrize("walk", [walk for walk in WALKS if commands(walk)])
def test_every_command_of_a_walk_runs(
    walk: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    for command in commands(walk):
        if command[0] == "compare":  # as many rows, but few and short runs
            command = [*command, "--steps", "1", "--rates", "1e-4", "--seeds", "1", "--max-length", "64"]
        if command[0] == "train" and not torch.cuda.is_available():
            command = [without_gpu(word) if word.startswith("recipes/") else word for word in command]
        assert run(command) == 0, f"{command}: {capsys.readouterr().err}"
