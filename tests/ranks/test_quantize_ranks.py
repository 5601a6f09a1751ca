"""Several processes quantize a model: the files are those of one process, and a death costs what it was doing."""

import os
import signal

import pytest

import qsvd
from qsvd.commands import quantize as command
from qsvd.files.quantize_folder import OutputFolder
from tests.checkpoints import write_checkpoint
from tests.commands.calibrations import texts
from tests.commands.folders import files_of
from tests.ranks.processes import lines, together

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
OPTIONS = ("--rank", 4, "--iterations", 1, "--device", "cpu", "--shard-size", "400KB")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    write_checkpoint(folder, vocab_size=1024, max_shard_size="100KB")
    return folder


@pytest.fixture(scope="module")
def alone(source, tmp_path_factory):
    """The files of one process. The folder's name, which is in them, is the same everywhere."""
    return made_in(tmp_path_factory.mktemp("alone"), source)


def made_in(folder, source, **options):
    before = os.getcwd()
    os.chdir(folder)
    try:
        chosen = {"rank": 4, "iterations": 1, "device": "cpu", "shard_size": "400KB", "out": "out"}
        from pathlib import Path

        qsvd.quantize(qsvd.Quantize(str(source), **(chosen | {"out": Path("out")} | options)))
    finally:
        os.chdir(before)
    return files_of(folder / "out")


def divided(count, folder, source, *more, at=None):
    def in_folder(rank):
        os.chdir(folder)
        if at is not None:
            at(rank)

    return together(count, folder / "shown", "quantize", source, "--out", "out", *OPTIONS, *more, at=in_folder)


def saves_of(rank_of_saver, act):
    """Let a process act before its second weight is saved."""
    count = 0
    save = OutputFolder.save

    def acting(self, *arguments):
        nonlocal count
        count += 1
        if count == 2:
            act()
        return save(self, *arguments)

    def at(rank):
        if rank == rank_of_saver:
            OutputFolder.save = acting

    return at


def test_every_process_splits_a_part_and_the_files_are_those_of_one_process(source, alone, tmp_path):
    def at(rank):
        split = command.split_stack

        def counted(*arguments):
            (tmp_path / f"split-{rank}").open("a").write("x")
            return split(*arguments)

        command.split_stack = counted

    codes, shown = divided(3, tmp_path, source, at=at)
    assert codes == [0, 0, 0], shown
    assert files_of(tmp_path / "out") == alone
    assert "out" in shown[0][0]
    assert [shown[1], shown[2]] == [["", ""]] * 2
    counts = [len((tmp_path / f"split-{rank}").read_text()) for rank in range(3)]
    weights = 7 * 2
    assert sum(counts) == weights
    assert min(counts) >= 3


@pytest.mark.parametrize("dying", [0, 1])
def test_one_that_is_killed_ends_all_with_one_sentence_and_any_number_goes_on(source, alone, tmp_path, dying):
    codes, shown = divided(2, tmp_path, source, at=saves_of(dying, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    assert codes[dying] == -signal.SIGKILL
    assert {code for rank, code in enumerate(codes) if rank != dying} <= {1, 130}
    assert len(lines(shown)) == 1
    assert "torchrun" in lines(shown)[0]
    assert (tmp_path / "out" / "unfinished" / "run.json").is_file()
    if dying:
        codes, shown = divided(2, tmp_path, source)
        assert codes == [0, 0], shown
        assert files_of(tmp_path / "out") == alone
    else:
        assert made_in(tmp_path, source) == alone


def test_an_error_of_any_process_is_said_once_with_its_exit_code(source, tmp_path):
    def fails():
        raise OSError(28, "No space left on device", "out/unfinished/here")

    codes, shown = divided(2, tmp_path, source, at=saves_of(1, fails))
    assert codes == [1, 1]
    assert lines(shown) == [
        "qsvd: out/unfinished/here: No space left on device; finished work is kept, the same command continues in out"
    ]


def test_a_bad_option_and_a_command_for_one_process_are_refused_once(source, tmp_path):
    refused = {2, -signal.SIGTERM}  # which ends one that has not come to it when the other one is refused
    codes, shown = divided(2, tmp_path, source, "--rank", 4000)
    assert 2 in codes
    assert {*codes} <= refused
    assert len(lines(shown)) == 1
    codes, shown = together(2, tmp_path / "shown", "report", source)
    assert 2 in codes
    assert {*codes} <= refused
    assert lines(shown) == ["qsvd: qsvd report runs in one process: start it without torchrun"]


def test_texts_weight_the_errors_as_in_one_process(tmp_path):
    from tests.commands.calibrations import stories

    model = stories()
    more = {"calibrate": str(texts()), "examples": 3, "max_length": 32, "include": ("*.[01].*.[qd]*_proj",)}
    alone = made_in(tmp_path_of(tmp_path, "alone"), model, **more)
    words = ("--calibrate", texts(), "--examples", 3, "--max-length", 32, "--include", "*.[01].*.[qd]*_proj")
    codes, shown = divided(2, tmp_path_of(tmp_path, "two"), model, *words)
    assert codes == [0, 0], shown
    assert files_of(tmp_path / "two" / "out") == alone


def tmp_path_of(tmp_path, name):
    (tmp_path / name).mkdir()
    return tmp_path / name
