"""What the tests of several commands start from."""

import io

import pytest
from transformers.utils import logging

import qsvd
from qsvd.cli import run as command
from tests.checkpoints import write_checkpoint
from tests.commands import calibrations
from tests.commands.folders import shared_model, write_first_layers
from tests.runs import classifier_base, language_base


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
def stories(tmp_path_factory):
    """The first two of the five layers of stories260K, a small model that was really trained."""
    return write_first_layers(shared_model("stories260K"), tmp_path_factory.mktemp("stories") / "source", 2)


@pytest.fixture(scope="session")
def stories_base(stories):
    """The result of `qsvd quantize` of it."""
    out = stories.with_name("out")
    return qsvd.quantize(qsvd.Quantize(str(stories), out=out, rank=8, iterations=1, device="cpu")).path


@pytest.fixture(scope="session")
def language(tmp_path_factory):
    """A language model at rank 16, with its source beside it; nobody writes there."""
    return language_base(tmp_path_factory.getbasetemp() / "language")


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """The same at rank 0."""
    return language_base(tmp_path_factory.getbasetemp() / "plain", rank=0)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random Llama of one block that is split and planned in no time, at rank 4, with its source beside it."""
    sizes = {"num_hidden_layers": 1, "num_key_value_heads": 4, "vocab_size": 4096, "max_position_embeddings": 128}
    return classifier_base(tmp_path_factory.getbasetemp() / "tiny", architecture="LlamaForCausalLM", **sizes)


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """A random BERT without a head at rank 4, with its source beside it; nobody writes there."""
    return classifier_base(tmp_path_factory.getbasetemp() / "bert")


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
