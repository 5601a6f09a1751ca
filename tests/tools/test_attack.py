"""The tool that attacks qsvd: what it says of mutations whose outcome is known."""

import json
from dataclasses import asdict

import pytest
import torch
from attacks.campaign import Campaign, tables
from attacks.commands import QUANTIZE, RUN, commands
from attacks.forks import import_everything
from attacks.judge import GOOD, Found
from attacks.subjects import OPTIONS, Maker, write_data, write_model

from qsvd.cli import COMMANDS, parse
from tests.stops import FORK

ATTACKED = {"report", "load", "verify", "verify run"}  # which take a fifth of a second
COUNT = 10


def test_every_attacked_command_has_the_options_that_qsvd_has(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "options.yaml").write_text(OPTIONS)
    lines = [command.words for command in commands(COMMANDS) if not command.words.startswith("load ")]
    assert len(lines) > 30
    assert all(parse(line.split()) for line in lines)


def attack(folder):
    """Make what these commands need and mutate it; the outcomes as JSON lines. In a fork, whose forks are the commands.

    So that there are no threads of others in them.
    """
    torch.set_num_threads(1)
    import_everything()
    subjects = folder / "subjects"
    subjects.mkdir()
    write_model(subjects / "tiny", seed=0, blocks=1)
    write_data(subjects)
    maker = Maker(subjects, folder / "made")
    maker.make(f"quantize tiny --out OUT {QUANTIZE}", "OUT")
    maker.make(f"train OUT data.jsonl --out RUN {RUN}", "RUN")
    campaign = Campaign(subjects, [folder / "0"], 0, 600.0)
    campaign.commands = [command for command in campaign.commands if command.name in ATTACKED]
    assert len(campaign.commands) == len(ATTACKED)
    found = "".join(f"{json.dumps(asdict(one))}\n" for one in campaign.mutations(range(COUNT)))
    (folder / "found.jsonl").write_text(found)


@pytest.mark.slow
def test_mutated_files_are_refused_or_change_nothing(tmp_path):
    process = FORK.Process(target=attack, args=(tmp_path,))
    process.start()
    process.join(timeout=600)
    assert process.exitcode == 0
    found = [Found(**json.loads(line)) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [one.number for one in found] == list(range(COUNT))
    assert [str(one) for one in found if one.outcome not in GOOD] == []
    assert {one.outcome for one in found} >= {"refused", "right"}
    assert "\n0 faults." in tables(found)
