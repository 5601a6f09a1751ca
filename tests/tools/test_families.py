"""Families through the commands; the rows of docs/models.md say what is seen here.

Families that are alike in all that qsvd tells apart go through the steps that read their weights, as do those that add
nothing to a larger one. The step "train" plans its memory; `tools/families` tries all steps on all of them.
"""

from pathlib import Path

import bitsandbytes  # noqa: F401  # imported here, not in the first test, so that no test's collections go through it
import pytest
import transformers
from family_steps import STEPS, Trial, read_families, table_row, texts_of

import qsvd.training.trainer  # noqa: F401  # as above

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
FILE = SHARED / "families" / "families.py"
FAMILIES = read_families(FILE) if FILE.is_file() else []

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FAMILIES, reason="the configs are not here")]


ROWS = {
    line.split("|")[1].strip(): line
    for line in (ROOT / "docs" / "models.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ")
}
QUANTIZE = 4  # the column after "plan"
ALL = tuple(step for step in STEPS if step != "plan")
SOME = ("quantize", "plain load", "load")
OTHERWISE_BUILT = {"gpt2", "phi3 (phi-4)", "gpt_neox", "bloom", "deepseek_v3", "gpt_oss", "bart", "whisper"}
PARTS = {  # of a family that goes through all steps
    "mixtral": "qwen2_moe",
    "llama4_text": "llama4 (mm)",
    "qwen3_5_text": "qwen3_5 (mm)",
    "qwen3_5_moe_text": "qwen2_moe",
    "falcon_h1": "zamba2",
    "gemma3 (mm)": "gemma4 (mm)",
    "mistral3 (Small-3.1+)": "gemma4 (mm)",
    "qwen3_vl": "qwen2_vl",
}


def takes_all_steps(family):
    """Whether no family before it has the same cells in the table, or its layers are built in another way."""
    cells = [row.split("|")[3:] for row in ROWS.values()]
    is_first = cells.index(ROWS[family.name].split("|")[3:]) == [*ROWS].index(family.name)
    return family.name in OTHERWISE_BUILT or (is_first and family.name not in PARTS)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.folder)
def test_a_family_does_what_the_table_says(tmp_path, family):
    transformers.utils.logging.disable_progress_bar()
    steps = ALL if takes_all_steps(family) else SOME
    outcome = Trial(family, tmp_path, SHARED / "models" / "stories260K", texts_of(SHARED)).outcome(steps)
    assert {step: said for step, said in outcome.steps.items() if said not in ("", "-")} == {}
    found, written = (row.split("|") for row in (table_row(outcome), ROWS[family.name]))
    assert found[-2:] == written[-2:], "what stays in 16 bits"
    if steps == ALL:
        assert found[QUANTIZE:] == written[QUANTIZE:]


def test_the_table_has_every_family():
    rows = [
        line.split("|")[1].strip() for line in (ROOT / "docs" / "models.md").read_text().splitlines() if "|" in line
    ]
    assert [family.name for family in FAMILIES] == rows[2:]
