"""Families of each kind, through every command; the rows of docs/models.md say what is seen here."""

from pathlib import Path

import pytest
import transformers
from family_steps import Trial, read_families, table_row, texts_of

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
FILE = SHARED / "families" / "families.py"
KINDS = ("t5", "mamba", "gpt_oss", "qwen3_vl")  # encoder-decoder, layers read past forward, experts, images

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FILE.is_file(), reason="the configs are not here")]


@pytest.mark.parametrize("name", KINDS)
def test_a_family_does_what_the_table_says(tmp_path, name):
    transformers.utils.logging.disable_progress_bar()
    family = next(family for family in read_families(FILE) if family.name == name)
    outcome = Trial(family, tmp_path, SHARED / "models" / "stories260K", texts_of(SHARED)).outcome()
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert outcome.works, outcome
    assert table_row(outcome) in page.splitlines()


def test_the_table_has_every_family():
    rows = [
        line.split("|")[1].strip() for line in (ROOT / "docs" / "models.md").read_text().splitlines() if "|" in line
    ]
    assert [family.name for family in read_families(FILE)] == rows[2:]
