"""Whatever ends a command, it says so in one sentence: a fault of qsvd in a report file, a signal in a line."""

import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import qsvd.commands.methods
from qsvd.cli import run
from tests.commands.folders import python_path


@pytest.fixture
def ends(monkeypatch, tmp_path, capsys):
    """Let `qsvd methods` do this; return the exit code and the lines on stderr."""
    monkeypatch.chdir(tmp_path)

    def end(work, *arguments):
        monkeypatch.setattr(qsvd.commands.methods, "main", work)
        code = run(["methods", *arguments])
        return code, capsys.readouterr().err.splitlines()

    return end


def fail(_options):
    raise ValueError("math domain error")


def test_a_fault_is_a_sentence_and_a_new_report(ends, tmp_path):
    for number in (1, 2):
        code, (sentence,) = ends(fail)
        assert code == 4
        found = re.fullmatch(
            r"qsvd: a fault of qsvd itself in `qsvd methods`: ValueError: math domain error; please report it with "
            r"(.*/qsvd-fault-[\w-]+\.txt)",
            sentence,
        )
        assert found
        assert len(list(tmp_path.iterdir())) == number
    text = (tmp_path / found[1]).read_text()
    assert re.search(r"in fail\n +raise ValueError", text)
    assert text.endswith("ValueError: math domain error\n")
    for line in (
        "command line: qsvd methods",
        f"qsvd {qsvd.__version__}",
        "torch ",
        f"Python {sys.version.split()[0]}",
    ):
        assert line in text
    assert (tmp_path / found[1]).stat().st_mode & 0o077 == 0


def test_the_file_in_hand_is_named(ends, monkeypatch):
    def damaged(path):
        del path
        raise KeyError("scales")

    monkeypatch.setattr("qsvd.files.atomic.json.loads", damaged)
    Path("a.json").write_text("{}")
    code, (sentence,) = ends(lambda _: qsvd.files.atomic.read_object(Path("a.json")))
    assert code == 4
    assert "in `qsvd methods` with a.json: KeyError: 'scales'; please" in sentence


def test_a_report_has_no_secrets(ends, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")

    def fail(_options):
        raise RuntimeError("https://me:pass-word@host 0123456789abcdef hf_AbCdEfGhIjKlMnOp")

    _, (sentence,) = ends(fail)
    text = Path(sentence.rpartition(" ")[2]).read_text()
    for secret in ("0123456789abcdef", "hf_A", "pass-word"):
        assert secret not in sentence + text
    assert "https://***@host *** ***" in sentence


def test_a_report_is_in_the_temporary_folder_where_the_current_one_takes_none(ends, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))

    def work(_options):
        (tmp_path / "gone").rmdir()
        raise RuntimeError

    _, (sentence,) = ends(work)
    assert Path(sentence.rpartition(" ")[2]).parent == tmp_path / "temporary"


def test_too_little_memory_is_no_fault(ends):
    def fail(_options):
        raise MemoryError

    assert ends(fail) == (3, ["qsvd: there is too little memory (MemoryError); close other programs that use it"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_every_command(ends, number):
    def work(_options):
        signal.raise_signal(number)

    def importing(_options):
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt as error:
            raise ImportError("cannot import torch") from error

    before = signal.getsignal(number)
    assert ends(work) == (130, ["qsvd: interrupted"])
    assert ends(importing) == (130, ["qsvd: interrupted"])
    assert signal.getsignal(number) is before


def shown(code):
    """Run Python lines in a process; its exit code and stderr."""
    environment = os.environ | {"PYTHONPATH": python_path()}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    return done.returncode, done.stderr


@pytest.mark.parametrize("module", ["qsvd.cli", "tyro", "qsvd.commands.methods"])
def test_a_signal_while_a_module_is_imported_ends_without_a_traceback(module):
    code = f"""
import signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == {module!r}: signal.raise_signal(signal.SIGTERM)
sys.meta_path.insert(0, Finder())
sys.argv = ["qsvd", "methods"]
from qsvd.__main__ import main
main()
"""
    assert shown(code) == (130, "qsvd: interrupted\n")


def test_a_second_signal_stops_at_once(stories_base):
    code = f"""
import signal, sys
import qsvd.commands.report
def work(_):
    try: signal.raise_signal(signal.SIGTERM)
    finally: signal.raise_signal(signal.SIGTERM); print("never", file=sys.stderr)
qsvd.commands.report.main = work
sys.argv = ["qsvd", "report", "{stories_base}"]
from qsvd.__main__ import main
main()
"""
    assert shown(code) == (130, "qsvd: interrupted, and stopped at once\n")


def test_a_full_disk_under_stdout_is_a_sentence(stories_base):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    command = [sys.executable, "-m", "qsvd", "report", stories_base]
    environment = os.environ | {"PYTHONPATH": python_path()}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stderr) == (1, "qsvd: No space left on device\n")
