"""Families through the commands; the rows of docs/models.md say what is seen here.

One family of each kind goes through all steps; the step "train" plans its memory. Those with another row in the table
go through the steps that read weights. The layers of the others are as those of one of these: the rules are applied to
their config. `tools/families` tries all steps on all of them.
"""

from pathlib import Path

import bitsandbytes  # noqa: F401  # imported here, not in the first test, so that no test's collections go through it
import pytest
import transformers
from family_steps import STEPS, Trial, in_16_bits, read_families, table_row, texts_of

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
WEIGHTS = ("quantize", "plain load", "load", "export")
TRAINED = {  # one of each kind of layers, blocks and inputs
    *("llama", "gpt2", "deepseek_v3", "qwen2_moe", "gpt_oss", "mamba", "zamba2", "gemma4 (mm)", "qwen2_vl"),
    *("bart", "whisper", "bert", "vit"),
}
OTHERWISE_BUILT = {"phi3 (phi-4)", "gpt_neox", "bloom", "lfm2", "deberta_v2", "modernbert"}


def steps_of(family):
    """All steps; those on weights where the table has another row, or experts; none of a family built as another is."""
    if family.name in TRAINED:
        return ALL
    cells = [row.split("|")[3:] for row in ROWS.values()]
    mine = ROWS[family.name].split("|")[3:]
    is_first = cells.index(mine) == [*ROWS].index(family.name)
    has_experts = mine[cells[0].index(" from_pretrained ")] == " - "
    return WEIGHTS if is_first or has_experts or family.name in OTHERWISE_BUILT else ()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.folder)
def test_a_family_does_what_the_table_says(tmp_path, family):
    transformers.utils.logging.disable_progress_bar()
    steps, written = steps_of(family), ROWS[family.name].split("|")
    if not steps:
        assert in_16_bits(family) == written[-2].strip()
        return
    outcome = Trial(family, tmp_path, SHARED / "models" / "stories260K", texts_of(SHARED)).outcome(steps)
    assert {step: said for step, said in outcome.steps.items() if said not in ("", "-")} == {}
    found = table_row(outcome).split("|")
    assert found[-2:] == written[-2:], "what stays in 16 bits"
    if steps == ALL:
        assert found[QUANTIZE:] == written[QUANTIZE:]


def test_the_table_has_every_family():
    rows = [
        line.split("|")[1].strip() for line in (ROOT / "docs" / "models.md").read_text().splitlines() if "|" in line
    ]
    assert [family.name for family in FAMILIES] == rows[2:]
