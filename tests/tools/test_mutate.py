"""The breaks of tools/mutate are those of the code as it is."""

from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_each_break_has_a_line_that_is_there_once():
    package = [file.read_text(encoding="utf-8") for file in (ROOT / "qsvd").rglob("*.py")]
    is_there, name = {}, ""
    for line in (ROOT / "tools" / "breaks.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("- "):
            old = line[2:].replace("\\n", "\n")
            is_there[name] |= sum(text.count(old) for text in package) == 1
        elif line and not line.startswith(("+", "#", "[")):
            name = line.partition(":")[0]
            is_there[name] = False
    assert is_there
    assert [name for name, found in is_there.items() if not found] == []
