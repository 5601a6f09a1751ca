"""What `import qsvd` brings along: transformers' registration, but not on qsvd's own command line, which stays fast."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import qsvd

HEAVY = ("torch", "transformers")
PROGRAM = Path(sys.executable).with_name("qsvd")


def run(*command, **variables):
    return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | variables)


def test_in_any_other_process_transformers_knows_the_method_after_the_import():
    """However often it is imported, and without a word."""
    code = "import importlib, qsvd; from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known; "
    done = run(sys.executable, "-c", f"{code} importlib.reload(qsvd); print(known['qsvd'])")
    assert done.stdout == "<class 'qsvd.adapters.quantizer.PackedQuantizer'>\n"
    assert not done.stderr


@pytest.mark.parametrize("start", [(sys.executable, "-m", "qsvd"), (str(PROGRAM),)], ids=["python -m qsvd", "qsvd"])
@pytest.mark.parametrize("flag", ["--version", "--help"])
def test_the_command_line_says_what_it_is_without_torch_or_transformers(start, flag):
    if not Path(start[0]).exists():
        pytest.skip("the program qsvd is not installed beside this Python")
    done = run(*start, flag, PYTHONPROFILEIMPORTTIME="1")  # which lists on stderr what is imported
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "qsvd" in done.stdout
    assert "qsvd.cli" in imported
    assert not imported & set(HEAVY)


def test_every_name_that_is_promised_is_there_and_no_other():
    assert all(getattr(qsvd, name) is not None for name in qsvd.__all__)
    with pytest.raises(AttributeError, match="module 'qsvd' has no attribute 'nothing'"):
        qsvd.nothing  # noqa: B018  # asked for, to be refused


def test_a_program_of_others_that_imports_it_while_python_looks_for_it_has_the_method(tmp_path):
    tool = tmp_path / "mytool"
    tool.mkdir()
    (tool / "__init__.py").write_text("import qsvd\n")
    asks = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known\nprint('qsvd' in known)\n"
    (tool / "__main__.py").write_text(asks)
    path = os.pathsep.join((str(tmp_path), str(Path(qsvd.__file__).parents[1])))
    assert run(sys.executable, "-m", "mytool", PYTHONPATH=path).stdout == "True\n"
