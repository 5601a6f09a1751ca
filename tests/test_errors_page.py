"""The messages that docs/errors.md explains are messages of the code."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MESSAGES = re.findall(r"^\| `(.*?)` \|", (ROOT / "docs" / "errors.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
CODE = " ".join(
    re.sub(r'"\s*\n\s*f?"', "", file.read_text(encoding="utf-8")) for file in sorted((ROOT / "qsvd").rglob("*.py"))
)


@pytest.mark.parametrize("message", MESSAGES)
def test_an_explained_message_is_in_the_code(message: str) -> None:
    words = r"\{[^\n]{1,80}?".join(re.escape(part) for part in re.split(r"\.\.\.", message))
    assert re.search(words, CODE), message
