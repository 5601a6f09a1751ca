"""Every family through every command; the rows of docs/models.md say what is seen here."""

from pathlib import Path

import bitsandbytes  # noqa: F401  # imported here, not in the first test, so that no test's collections go through it
import pytest
import transformers
from family_steps import Trial, read_families, table_row, texts_of

import qsvd.training.trainer  # noqa: F401  # as above

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
FILE = SHARED / "families" / "families.py"
FAMILIES = read_families(FILE) if FILE.is_file() else []

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FAMILIES, reason="the configs are not here")]


@pytest.mark.apart
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.folder)
def test_a_family_does_what_the_table_says(tmp_path, family):
    transformers.utils.logging.disable_progress_bar()
    outcome = Trial(family, tmp_path, SHARED / "models" / "stories260K", texts_of(SHARED)).outcome()
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert outcome.works, outcome
    assert table_row(outcome) in page.splitlines()


def test_the_table_has_every_family():
    rows = [
        line.split("|")[1].strip() for line in (ROOT / "docs" / "models.md").read_text().splitlines() if "|" in line
    ]
    assert [family.name for family in FAMILIES] == rows[2:]
