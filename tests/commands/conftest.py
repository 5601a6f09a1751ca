"""What the tests of several commands start from."""

import io

import pytest
from transformers.utils import logging

import qsvd
from qsvd.cli import run as command
from tests.checkpoints import write_checkpoint
from tests.commands import calibrations
from tests.commands.folders import shared_model


@pytest.fixture(scope="session", autouse=True)
def _no_bars_of_the_tests_own():
    """What a test loads by itself must not stand among what a command prints."""
    logging.disable_progress_bar()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny random checkpoint."""
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """The result of `qsvd quantize` of a shared model, by its name; made when it is first asked for."""
    made = {}

    def base(name):
        if name not in made:
            out = tmp_path_factory.mktemp("base") / name
            made[name] = qsvd.quantize(
                qsvd.Quantize(str(shared_model(name)), out=out, rank=8, iterations=1, device="cpu")
            ).path
        return made[name]

    return base


@pytest.fixture
def stories():
    """A small model that was really trained."""
    return calibrations.stories()


@pytest.fixture
def texts():
    """A few texts, as a file."""
    return calibrations.texts()


@pytest.fixture
def classifier():
    """A random BERT with names for its classes."""
    return calibrations.classifier()


@pytest.fixture
def generate(capsys, monkeypatch):
    """The command with this text on stdin: its exit code, stdout and stderr."""

    def run(*words, stdin=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        code = command(["generate", *map(str, words)])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run
