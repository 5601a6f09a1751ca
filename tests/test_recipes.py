"""Every recipe is a file of options for `qsvd train` and `qsvd plan`; its comment and the guide say what is planned."""

import json
import math
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pytest

from qsvd.cli import parse
from qsvd.errors import parse_size
from qsvd.memory.duration import step_time
from qsvd.memory.items import MemoryPlan
from qsvd.memory.other_tasks import plan_quantizing
from qsvd.memory.placement import Placed, place
from qsvd.options import Plan, Train
from qsvd.prepare.check_options import check
from qsvd.prepare.plan import PlanJob, prepare_plan
from tests.checkpoints import write_tokenizer

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
ASKED = {"8b-8gb", "8b-12gb", "8b-24gb", "32b-24gb", "70b-24gb", "70b-48gb", "70b-80gb"}
SMALLER = {"8GB": "6GB", "12GB": "8GB", "16GB": "12GB", "24GB": "16GB", "48GB": "24GB", "80GB": "48GB"}
MOST_HOST = {"8GB": 16, "12GB": 16, "16GB": 32, "24GB": 48, "48GB": 48, "80GB": 48}  # GB that a usual machine has free
ROUNDING = 0.06  # GB, of a number with one decimal

QWEN = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "head_dim": 128} | {
    "max_position_embeddings": 40960,
    "num_key_value_heads": 8,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256} | {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
PUBLISHED = {  # Hub id -> config.json, and the number of parameters on the Hub
    "Qwen/Qwen3-8B": (
        QWEN | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
        8_190_735_360,
    ),
    "Qwen/Qwen3-32B": (
        QWEN | {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64},
        32_762_123_264,
    ),
    "meta-llama/Llama-3.1-70B-Instruct": (
        LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
        70_553_706_496,
    ),
}


@dataclass(frozen=True)
class Planned:
    """A recipe as `qsvd plan --config` plans it."""

    file: Path

    @property
    def comment(self) -> list[str]:
        return [line for line in self.file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]

    @cached_property
    def options(self) -> Plan:
        return parse(["plan", "--config", str(self.file)])

    @cached_property
    def job(self) -> PlanJob:
        return prepare_plan(self.options)

    @cached_property
    def placed(self) -> Placed:
        return place(self.job.model, self.job.training, self.job.limits, self.job.wish)

    @property
    def memory(self) -> MemoryPlan:
        return self.placed.memory

    @property
    def blocks(self) -> str:
        return f"{self.placed.placement.resident} of {len(self.job.model.blocks)}"

    @property
    def row(self) -> str:
        """The row of the guide's table."""
        options, command = self.options, f"qsvd train --config recipes/{self.file.name} DATA --out RUN"
        gigabytes = [f"{self.memory.total(where) / 1e9:.1f} GB" for where in ("gpu", "host")]
        return f"| {options.model} | {options.gpu[:-2]} GB | {' | '.join(gigabytes)} | {self.blocks} | `{command}` |"

    def resident(self, **changes: str | int | None) -> int:
        """Return how many blocks stay on the GPU with other options; -1 where nothing fits."""
        job = prepare_plan(replace(self.options, **changes))
        found = place(job.model, job.training, job.limits, job.wish)
        return found.placement.resident or 0 if found.memory.fits else -1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the Hub ids of the recipes are folders with a config.json alone."""
    folder = tmp_path_factory.mktemp("hub")
    for name, (config, _) in PUBLISHED.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def plans() -> dict[Path, Planned]:
    return {file: Planned(file) for file in RECIPES}


@pytest.fixture(params=RECIPES, ids=lambda file: file.stem)
def planned(request: pytest.FixtureRequest, plans, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Planned:
    monkeypatch.chdir(folder)
    return plans[request.param]


def test_there_is_a_recipe_for_every_common_case():
    names = {file.stem for file in RECIPES}
    assert names > ASKED
    assert {name.partition("-")[0] for name in names - ASKED} == {"classifier", "32b"}
    assert any(name.endswith("-2bit") for name in names)


def test_its_options_are_those_of_a_run_with_data_and_out_from_the_command_line(planned, tmp_path):
    (tmp_path / "data.jsonl").touch()
    words = ["--config", str(planned.file), str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "RUN")]
    options = parse(["train", *words])
    check(options, is_open=True)
    assert isinstance(options, Train)
    assert (options.base, options.data) == (planned.options.model, str(tmp_path / "data.jsonl"))
    assert (options.rank, options.gpu, options.max_length) == (
        planned.options.rank,
        planned.options.gpu,
        planned.options.max_length,
    )
    assert parse(["train", *words, "--rank", "8"]) == replace(options, rank=8), "the command line overrides the file"


def test_it_fits_the_gpu_in_its_name(planned):
    assert f"-{planned.options.gpu.lower()}" in planned.file.stem
    assert parse_size(planned.options.host, "host") <= MOST_HOST[planned.options.gpu] * 10**9
    assert planned.memory.fits
    assert plan_quantizing(planned.job.model, "cuda", planned.job.limits).fits
    parameters = sum(math.prod(shape) for shape in planned.job.model.names.shapes.values())
    assert parameters == PUBLISHED[planned.options.model][1]


def test_it_uses_that_gpu(planned):
    job = planned.job
    limits = replace(job.limits, gpu=parse_size(SMALLER[planned.options.gpu], "gpu"))
    found = place(job.model, job.training, limits, job.wish)
    assert not found.memory.fits or found.placement.resident < planned.placed.placement.resident


def test_its_comment_says_what_is_planned(planned):
    assert len(planned.comment) == 3
    whom, chosen, memory = planned.comment
    assert f"{planned.options.gpu[:-2]} GB" in whom
    assert f"rank {planned.options.rank} " in chosen.lower()
    assert f"{planned.options.max_length:,} tokens" in chosen
    assert f" {planned.blocks} blocks stay on the GPU" in chosen
    gpu, host = re.search(r"Planned: ([\d.]+) GB of GPU and ([\d.]+) GB of CPU memory\. ", memory).groups()
    assert float(gpu) == pytest.approx(planned.memory.total("gpu") / 1e9, abs=ROUNDING)
    assert float(host) == pytest.approx(planned.memory.total("host") / 1e9, abs=ROUNDING)
    assert memory.endswith(f"qsvd train --config recipes/{planned.file.name} DATA --out RUN")
    if found := re.search(r"in (float32|bfloat16)", chosen):
        assert str(planned.job.model.adapter_dtype) == f"torch.{found[1]}"
    if "Copying the others takes less time than computing" in chosen:
        step = step_time(planned.job.model, planned.job.training, planned.placed.placement, planned.job.speed)
        assert 0 < step.transfer < step.compute
    if found := re.search(r"\((\d+) at rank (\d+)\)", chosen):
        assert planned.resident(rank=int(found[2])) == int(found[1])
    if found := re.search(r"\((\d+) at 4 bits\)", chosen):
        assert planned.resident(budget=None) == int(found[1])


def test_the_guide_lists_it(planned):
    assert planned.row in GUIDE


def test_the_guide_lists_no_other():
    assert len(re.findall(r"--config recipes/[\w-]+\.yaml DATA", GUIDE)) == len(RECIPES)


def test_a_classifier_is_planned_as_with_labelled_data(folder, monkeypatch):
    """With the tokenizer of the embedded model, and texts of which most are cut at the longest length."""
    monkeypatch.chdir(folder)
    write_tokenizer(folder / "Qwen" / "Qwen3-8B")
    rows = [
        {"text": f"{number} " * min(600, 100 * number + 10), "label": ["no", "yes"][number % 2]} for number in range(9)
    ]
    Path("labelled.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = ROOT / "recipes" / "classifier-12gb.yaml"
    job = prepare_plan(parse(["plan", "--config", str(recipe), "labelled.jsonl"]))
    assert job.run is not None
    assert job.run.data.train.label_names == ("no", "yes")
    assert job.run.placed.memory.total("gpu") == Planned(recipe).memory.total("gpu")
