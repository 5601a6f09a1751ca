"""`qsvd methods`: what it prints of a method is what the papers count and what the other commands do."""

import contextlib
import io
import json

import pytest

import qsvd
from qsvd.adapters.methods.table import METHODS
from qsvd.adapters.model import split_linears
from qsvd.cli import parse, run
from tests.checkpoints import write_checkpoint
from tests.commands.trained_runs import METHODS as TRAINED
from tests.commands.trained_runs import ROUTED, write_run
from tests.gradients import write_gradients

PARAMETERS = {  # the default rank r on stored components of rank 64, and what is trained of an [m, n] weight
    "pissa": (64, lambda m, n, r: r * (m + n)),
    "lora": (64, lambda m, n, r: r * (m + n)),
    "edora": (64, lambda m, _, r: r**2 + m),
    "lora-xs": (64, lambda *sizes: sizes[2] ** 2),
    "sorsa": (64, lambda m, n, r: r * (m + n + 1)),
    "dora": (32, lambda m, n, r: r * (m + n) + m),
    "adalora": (12, lambda m, n, r: r * (m + n + 1)),
    "lora-fa": (64, lambda m, _, r: r * m),
    "vera": (256, lambda m, _, r: r + m),
    "lora-ga": (32, lambda m, n, r: r * (m + n)),
    "randlora": (32, lambda m, n, r: min(m, n) // r * (r + min(m, n))),
    "sara": (64, lambda m, n, r: r * (m + n + 1)),
    "mo-sara": (64, lambda m, _, r: 5 * r + r + 5 + m),
    "r-lora": (4, lambda m, n, r: r * n + 5 * r * m + 5 * n),
    "melora": (1, lambda m, n, r: r * (m + n)),
    "kron-lora": (8, lambda m, n, r: 16 + r * (m + n) // 4),
    "singlora": (8, lambda m, n, r: r * max(m, n)),
    "symlora": (8, lambda m, n, r: r * (max(m, n) + 1)),
    "lora-mini": (16, lambda *sizes: sizes[2] * 128),
    "cora": (64, lambda _, n, r: r * n),
    "lorta": (8, lambda m, n, r: (m == n) * r * (n + 128 + 32 + 4 + 32) / 64),  # once for 64 weights of this size
    "lora2": (8, lambda m, n, r: r * (m + n) + 2 * r * r + r),
    "delta-lora": (64, lambda m, n, r: r * (m + n)),
    "xgblora": (32, lambda m, n, _: m + n),
    "weightlora": (8, lambda m, n, r: r * (m + n) + 1),
    "losa": (8, lambda m, n, r: r * (m + n)),
}
BESIDE = ("randlora", "r-lora", "losa")  # what is added is no product of factors
LLAMA = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 2 + [(4096, 14336)]  # 32 blocks of these
FORMS = ("peft", "lora", "merged")
EXPORTED = ("lora", "dora", "randlora", "losa", "mo-sara", "r-lora")  # with a gain or a refusal, and one other


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_checkpoint(folder / "source", num_hidden_layers=1)
    return qsvd.quantize(folder / "source", out=folder / "out", rank=4, iterations=1, device="cpu").path


@pytest.fixture(scope="module")
def rows():
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert run(["methods", "--json"]) == 0
    return {row["name"]: row for row in json.loads(out.getvalue())["methods"]}


def test_parameters_are_those_of_the_papers_on_the_linear_layers_of_llama_3_1_8b(rows):
    found = {name: (row["rank"], row["trained_parameters"]) for name, row in rows.items()}
    assert found == {
        name: (rank, 32 * sum(count(m, n, rank) for m, n in LLAMA)) for name, (rank, count) in PARAMETERS.items()
    }


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks for an old name
@pytest.mark.parametrize("method", EXPORTED)
def test_the_list_says_what_export_accepts(rows, method, base, tmp_path):
    write_run(base, tmp_path / "run", method)
    said = {}
    for form in FORMS:
        try:
            qsvd.export(tmp_path / "run", to=form, out=tmp_path / form, check=False)
        except qsvd.BadInput as error:
            said[form] = str(error)
    assert rows[method]["refused"] == said
    kind = "none" if {"peft", "merged"} <= said.keys() else "merged only"
    if "peft" not in said:
        uses_dora = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["use_dora"]
        kind = "PEFT DoRA" if uses_dora else "PEFT LoRA"
    assert rows[method]["export"] == kind


@pytest.mark.parametrize("method", METHODS)
def test_the_list_says_what_the_adapter_starts_as(rows, method, base, tmp_path):
    own = {"own": {"gradients": write_gradients(base, tmp_path / "gradients", 4)}} if method == "lora-ga" else {}
    model = qsvd.load(base, options=qsvd.AdapterOptions(method, **(TRAINED | ROUTED)[method], **own))
    _, linear = next(iter(split_linears(model)))
    stored = next(iter(json.loads((base / "qsvd.json").read_text())["weights"].values()))["rank"]
    is_added = method in BESIDE or len(linear.adapter.factors()[1]) > stored
    assert rows[method]["starts_as"].startswith("zero, added" if is_added else "the components")


def test_the_table_has_every_method_once_and_the_next_line_runs(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["methods"]) == 0
    table, err = capsys.readouterr()
    rows = [line.split("│")[1].strip() for line in table.splitlines() if line.startswith("│")]
    assert [name for name in rows if name] == [*METHODS]
    assert "…" not in table, "nothing is cut on a terminal of 80 columns"
    assert "qsvd export --to lora refuses edora, dora: the method scales the rows" in table
    with pytest.raises(SystemExit) as ended:
        parse(err.removeprefix("Next: qsvd ").partition("#")[0].split())
    assert ended.value.code == 0
