"""Families through the commands; the rows of docs/models.md say what is seen here.

Those whose layers, blocks or inputs are of a kind of their own go through all steps, or through those that read
weights, with the export where it puts experts together. The rules are applied to the configs of the others: Llama, BERT
and Whisper are in many tests of each command, and T5, Mixtral, GPT-OSS, GPT-NeoX and LLaVA in tests/adapters and
tests/training. The step "train" plans its memory too. `tools/families` tries all steps on all families.
"""

from dataclasses import replace
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
WEIGHTS = ("quantize", "plain load", "load")
TRIED = dict.fromkeys(("gpt2", "zamba2", "qwen2_vl", "bart", "vit"), ALL)
TRIED |= dict.fromkeys(("llama4_text", "granitemoe", "deepseek_v3"), (*WEIGHTS, "export"))
TRIED |= dict.fromkeys(("qwen3_5_text", "gemma3n_text", "gemma4 (mm)", "mamba", "lfm2", "phi3 (phi-4)"), WEIGHTS)
TRIED |= dict.fromkeys(("bloom", "deberta_v2", "modernbert"), WEIGHTS)
SHORTER = {"zamba2": {"chunk_size": 32}}  # of its scans, which fill up what they read


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.folder)
def test_a_family_does_what_the_table_says(tmp_path, family):
    transformers.utils.logging.disable_progress_bar()
    steps, written = TRIED.get(family.name), ROWS[family.name].split("|")
    if not steps:
        assert in_16_bits(family) == written[-2].strip()
        return
    if family.name in SHORTER:
        family = replace(family, options={**family.options, **SHORTER[family.name]})
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
