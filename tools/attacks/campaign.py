"""Many attacks, some at the same time, and the tables of their outcomes."""

import json
import os
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import TextIO

from attacks.commands import Command, commands
from attacks.forks import listing, make_place, start
from attacks.judge import BAD, GOOD, Attack, Found, Right, difference, result_of, targets_of

Work = Callable[[int, Path], Found]


class Campaign:
    """Attacks of one seed on the same subjects.

    Args:
        subjects: From `make_subjects`.
        places: Folders to work in, one for each process that works.
        limit: Seconds for a command.
    """

    def __init__(self, subjects: Path, places: Sequence[Path], seed: int, limit: float):
        from qsvd.cli import COMMANDS

        self.subjects, self.places, self.seed, self.limit = subjects, places, seed, limit
        self.commands = commands(COMMANDS)
        self.rights: dict[str, Right] = {}

    def mutations(self, numbers: Sequence[int], texts: Sequence[str] = ()) -> Iterator[Found]:
        """Try the mutations of these numbers; yield their outcomes.

        Args:
            texts: Only those of commands in whose names one of these is.
        """
        targets = [one for command in self.commands for one in targets_of(command, self.subjects)]
        Random(self.seed).shuffle(targets)
        chosen = {number: targets[number % len(targets)] for number in numbers}
        if texts:
            chosen = {number: one for number, one in chosen.items() if any(text in one[0].name for text in texts)}
        for command, _ in chosen.values():
            self.right(command)

        def work(number: int, place: Path) -> Found:
            right = self.right(chosen[number][0])
            attack = Attack(number, self.seed, chosen[number], self.subjects, right)
            return attack.end(place, attack.begin(place, self.limit).wait())

        yield from shared([*chosen], self.places, work)

    def right(self, command: Command) -> Right:
        """Return what a command does without an attack; it is run twice.

        Raises:
            RuntimeError: it fails.
        """
        if command.name not in self.rights:
            first, second = self._undisturbed(command), self._undisturbed(command)
            names = {**first.files, **second.files}
            unstable = frozenset(name for name in names if first.files.get(name) != second.files.get(name))
            if wrong := difference(command, first, second):
                print(f"qsvd {command.words}: twice, {wrong}", flush=True)
            seconds = min(first.seconds, second.seconds)
            self.rights[command.name] = Right(first.out, first.files, seconds, unstable)
        return self.rights[command.name]

    def _undisturbed(self, command: Command) -> Right:
        place = self.places[0]
        make_place(place, self.subjects, command.inputs)
        ended = start(command.words.split(), place, limit=self.limit).wait()
        if ended.code:
            raise RuntimeError(f"qsvd {command.words} ended with {ended.code}: {ended.err[-2000:]}")
        return result_of(command, place, ended, listing(place), set())


def shared(numbers: Sequence[int], places: Sequence[Path], work: Work) -> Iterator[Found]:
    """Do numbered work in as many processes as there are places; yield what comes back."""
    pipes: list[TextIO] = []
    for job, place in enumerate(places):
        reading, writing = os.pipe()
        if os.fork() == 0:
            _work(numbers[job :: len(places)], place, work, writing)
        os.close(writing)
        pipes.append(os.fdopen(reading))
    while pipes:
        for pipe in [*pipes]:
            if line := pipe.readline():
                yield Found(**json.loads(line))
            else:
                pipes.remove(pipe)
                if os.wait()[1]:
                    raise RuntimeError("a process that attacks has failed; see above")


def _work(numbers: Iterable[int], place: Path, work: Work, writing: int) -> None:
    code = 1
    try:
        with os.fdopen(writing, "w") as file:
            for number in numbers:
                print(json.dumps(asdict(work(number, place))), file=file, flush=True)
        code = 0
    except BaseException:  # noqa: BLE001  # else the fork would go on as the parent
        traceback.print_exc()
    finally:
        os._exit(code)


def tables(found: Sequence[Found], titles: Sequence[str] = ("command", "file")) -> str:
    """Return outcomes by command and by kind of file, and all faults, as Markdown."""
    shown = (*GOOD, *BAD)
    lines: list[str] = []
    for title in titles:
        rows: dict[str, Counter[str]] = {}
        for one in sorted(found, key=lambda one: one.command if title == "command" else one.kind):
            rows.setdefault(one.command if title == "command" else one.kind, Counter())[one.outcome] += 1
        rows["all"] = Counter(one.outcome for one in found)
        lines += [f"| {title} | {' | '.join(shown)} |", f"| --- |{' ---: |' * len(shown)}"]
        lines += [f"| {name} | {' | '.join(str(row[one] or '') for one in shown)} |" for name, row in rows.items()]
        lines.append("")
    faults = sorted((one for one in found if one.outcome in BAD), key=lambda one: (one.outcome, one.number))
    return "\n".join([*lines, f"{len(faults)} faults.", *(f"- {one}" for one in faults)]) + "\n"
