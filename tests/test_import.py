"""`import qsvd` loads next to nothing and registers with transformers, whichever of the two is imported first."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import qsvd

HEAVY = {"torch", "transformers", "bitsandbytes", "datasets", "numpy", "accelerate", "peft", "trl"}
PROGRAM = Path(sys.executable).with_name("qsvd")
LOADED = "import json, sys; print(json.dumps(sorted(sys.modules)))"
IS_KNOWN = (
    "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as q, AUTO_QUANTIZATION_CONFIG_MAPPING as c; "
    "print(q['qsvd'].__name__, c['qsvd'].__name__)"
)
KNOWN = "PackedQuantizer PackedConfig\n"


SERVER = """
import json, os, sys, tempfile, traceback
import torch, bitsandbytes, accelerate, transformers.models  # these take most of the time of a start

assert not {"transformers.quantizers", "qsvd"} & set(sys.modules)

for line in sys.stdin:
    with tempfile.TemporaryFile("w+") as printed:
        if (child := os.fork()) == 0:
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
            try:
                exec(json.loads(line), {"__name__": "__main__"})
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(0)
        os.waitpid(child, 0)
        printed.seek(0)
        print(json.dumps(printed.read()), flush=True)
"""


def run(*command, **variables):
    return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | variables)


def python(code, **variables):
    done = run(sys.executable, "-c", code, **variables)
    assert not done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def forked():
    """A function that runs code in a process that has imported transformers without its quantizers; its output."""
    words = [sys.executable, "-c", SERVER]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}  # bitsandbytes compiles on import
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as server:

        def answer(code):
            server.stdin.write(json.dumps(code) + "\n")
            server.stdin.flush()
            return json.loads(server.stdout.readline())

        yield answer
        server.stdin.close()


def test_the_import_loads_the_package_and_its_hook_and_no_library():
    before = set(json.loads(python(LOADED)))
    loaded = set(json.loads(python(f"import qsvd; {LOADED}"))) - before
    ours = {name for name in loaded if name.partition(".")[0] == "qsvd"}
    assert ours == {"qsvd", "qsvd.hf"}
    assert {name.partition(".")[0] for name in loaded - ours} <= sys.stdlib_module_names


@pytest.mark.parametrize(
    "imports",
    [
        "import transformers.quantizers.auto, qsvd",
        "import qsvd, qsvd.adapters.quantizer",
        "import importlib, qsvd, qsvd.hf; importlib.reload(qsvd.hf); importlib.reload(qsvd)",
        "import transformers.quantizers.auto, importlib, qsvd.hf; importlib.reload(qsvd.hf)",
    ],
)
def test_transformers_knows_the_method_in_either_order(forked, imports):
    assert forked(f"{imports}; {IS_KNOWN}") == KNOWN


def test_the_hook_is_gone_when_its_work_is_done(forked):
    known, finders = forked(f"import sys, qsvd; {IS_KNOWN}; print(*map(type, sys.meta_path))").splitlines()
    assert f"{known}\n" == KNOWN
    assert "type" in finders
    assert "qsvd" not in finders


def test_the_import_does_not_depend_on_who_runs_it(forked, tmp_path):
    """A program named qsvd that is not ours, and a package that imports qsvd while Python looks for its main module."""
    program = tmp_path / "qsvd"
    program.write_text(f"import sys; sys.path.pop(0); import qsvd; {IS_KNOWN}")
    tool = tmp_path / "mytool"
    tool.mkdir()
    (tool / "__init__.py").write_text("import qsvd\n")
    (tool / "__main__.py").write_text(IS_KNOWN)
    as_script = f"sys.path.insert(0, {str(tmp_path)!r}); sys.argv[:] = [{str(program)!r}]"  # as Python itself does
    assert forked(f"import runpy, sys; {as_script}; runpy.run_path(sys.argv[0], run_name='__main__')") == KNOWN
    as_module = f"sys.path.append({str(tmp_path)!r}); runpy._run_module_as_main('mytool')"  # what python -m calls
    assert forked(f"import runpy, sys; {as_module}") == KNOWN


@pytest.mark.parametrize("start", [(sys.executable, "-m", "qsvd"), (str(PROGRAM),)], ids=["python -m qsvd", "qsvd"])
@pytest.mark.parametrize("flag", ["--version", "--help"])
def test_the_command_line_says_what_it_is_without_torch_or_transformers(start, flag):
    if not Path(start[0]).exists():
        pytest.skip("the program qsvd is not installed beside this Python")
    done = run(*start, flag, PYTHONPROFILEIMPORTTIME="1")  # which lists on stderr what is imported
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "qsvd" in done.stdout
    assert "qsvd.cli" in imported
    assert not imported & HEAVY - {"numpy"}  # rich asks whether numpy is there


def test_every_name_that_is_promised_is_there_and_no_other():
    assert set(qsvd.__all__) == {
        "AdapterOptions", "BadInput", "DoesNotFit", "Int4", "Nesting", "NormalFloat", "NormalFloat4",
        "Placement", "Quantize", "Recipe", "Split", "aggregate", "allocate", "calibrate", "compare", "evaluate",
        "export", "generate", "load", "measure", "plan", "prune", "quantize", "split_weight", "train",
    }  # fmt: skip
    assert all(getattr(qsvd, name) is not None for name in qsvd.__all__)
    assert set(qsvd.__all__) <= set(dir(qsvd))
    with pytest.raises(AttributeError, match="module 'qsvd' has no attribute 'nothing'"):
        qsvd.nothing  # noqa: B018  # asked for, to be refused


def test_a_function_is_found_also_after_the_folder_of_its_name_was_imported(forked):
    code = "import qsvd, qsvd.plan.budget, qsvd.evaluate.batches, qsvd.calibrate.sums, qsvd.export.trained"
    names = "plan", "evaluate", "calibrate", "export"
    assert forked(f"{code}; print({{getattr(qsvd, name).__module__ for name in {names}}})") == "{'qsvd.api'}\n"


def test_type_checkers_see_every_name_at_the_place_that_it_comes_from():
    tree = ast.parse(Path(qsvd.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname: line.module for line in block.body for alias in line.names if alias.name == alias.asname}
    assert seen == qsvd._HOMES


def test_a_function_keeps_its_name_that_a_folder_has_too(forked):
    code = "import transformers.quantizers.auto; import qsvd, qsvd.plan.solve; print(callable(qsvd.plan))"
    assert forked(code) == "True\n"
