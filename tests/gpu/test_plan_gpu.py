"""The planned peak of a run on a GPU against what torch says it allocated."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qsvd.commands.demo import FINE_TUNING, MODEL
from qsvd.commands.train import train
from qsvd.options import Train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # of the libraries, which on a GPU are not ours to silence
]

NEAR = 0.07  # of the peak
MAKE_MODEL = Path(__file__).parents[2] / "tools" / "make_model"
SHAPE = ["--layers=12", "--hidden=2048", "--ffn=5632", "--heads=16", "--kv-heads=8", "--vocab=32000"]
RUNS = {
    "all stays": {},
    "half visits": {"resident": 0.5},
    "all visits, from disk": {"resident": 0.0, "host": "1GB"},
    "long sequences": {"max_length": 4096, "batch_size": 1},
    "no checkpoints of activations": {"gradient_checkpointing": False, "batch_size": 1},
    "activations on the host": {"activation_offload": "yes", "batch_size": 1, "max_length": 4096},
    "AdamW in 32 bits, LoRA beside": {"optimizer": "adamw", "method": "lora", "rank": 128},
    "EDoRA, layer by layer": {"method": "edora", "layer_major": True},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base") / "OUT"
    command = [sys.executable, MAKE_MODEL, out, "--as=split", "--rank=32", f"--tokenizer={MODEL}", *SHAPE]
    subprocess.run(command, check=True)
    return out


@pytest.mark.parametrize("name", RUNS)
def test_the_peak_is_within_seven_percent_of_the_plan(base: Path, tmp_path: Path, name: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text(FINE_TUNING.read_text(encoding="utf-8") * 3, encoding="utf-8")
    chosen = {"steps": 3, "batch_size": 2, "accumulate": 2, "max_length": 1024, "held_out": 0.0} | RUNS[name]
    run = train(Train(base, str(text), tmp_path / "RUN", any_start=True, device="cuda", **chosen))  # pyright: ignore
    summary = json.loads((run / "summary.json").read_text())
    assert summary["planned"]["peak"] == pytest.approx(summary["memory"]["peak"], rel=NEAR), summary
