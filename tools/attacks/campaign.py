"""Many mutations, some at the same time, and the tables of their outcomes."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from random import Random

from attacks.commands import Command, commands
from attacks.forks import listing, make_place, start
from attacks.judge import BAD, GOOD, Attack, Found, Right, difference, result_of, targets_of
from attacks.subjects import make_subjects


class Campaign:
    """Mutations of one seed.

    Args:
        folder: To work in. Subjects that were made in it before are used again.
        jobs: Commands that run at the same time.
        limit: Seconds for a command.
    """

    def __init__(self, folder: Path, seed: int, jobs: int, limit: float):
        from qsvd.cli import COMMANDS

        self.folder, self.seed, self.limit = folder, seed, limit
        self.places = [folder / f"{job}" for job in range(jobs)]
        self.subjects = make_subjects(folder)
        self.targets = [one for command in commands(COMMANDS) for one in targets_of(command, self.subjects)]
        Random(seed).shuffle(self.targets)
        self._rights: dict[str, Right] = {}

    def mutations(self, numbers: Iterable[int]) -> Iterator[Found]:
        """Try the mutations of these numbers; yield their outcomes."""
        waiting = list(reversed([*numbers]))
        for number in waiting:
            self.right(self.targets[number % len(self.targets)][0])
        free, running = [*self.places], {}
        while waiting or running:
            while waiting and free:
                number, place = waiting.pop(), free.pop()
                command, target = self.targets[number % len(self.targets)]
                attack = Attack(number, self.seed, (command, target), self.subjects, self.right(command))
                running[place] = attack, attack.begin(place, self.limit)
            for place, (attack, run) in list(running.items()):
                if (ended := run.poll()) is not None:
                    del running[place]
                    free.append(place)
                    yield attack.end(place, ended)
            time.sleep(0.005)

    def right(self, command: Command) -> Right:
        """Return what a command does without a mutation; it is run twice.

        Raises:
            RuntimeError: it fails.
        """
        if command.name not in self._rights:
            first, second = self._undisturbed(command), self._undisturbed(command)
            names = {**first.files, **second.files}
            unstable = frozenset(name for name in names if first.files.get(name) != second.files.get(name))
            if wrong := difference(command, first, second):
                print(f"qsvd {command.words}: twice, {wrong}", flush=True)
            self._rights[command.name] = Right(first.out, first.files, unstable)
        return self._rights[command.name]

    def _undisturbed(self, command: Command) -> Right:
        place = self.places[0]
        make_place(place, self.subjects, command.inputs)
        ended = start(command.words.split(), place, limit=self.limit).wait()
        if ended.code:
            raise RuntimeError(f"qsvd {command.words} ended with {ended.code}: {ended.err[-2000:]}")
        return result_of(command, place, ended, listing(place), set())


def report(found: Sequence[Found], command: str) -> str:
    """Return the result as Markdown: outcomes by command and by kind of file, and all faults."""
    shown = (*GOOD, *BAD)
    lines = [f"`{command}`, {datetime.now():%Y-%m-%d %H:%M}", ""]
    for title in ("command", "file"):
        rows: dict[str, Counter[str]] = {}
        for one in sorted(found, key=lambda one: one.command if title == "command" else one.kind):
            rows.setdefault(one.command if title == "command" else one.kind, Counter())[one.outcome] += 1
        rows["all"] = Counter(one.outcome for one in found)
        lines += [f"| {title} | {' | '.join(shown)} |", f"| --- |{' ---: |' * len(shown)}"]
        lines += [f"| {name} | {' | '.join(str(row[one] or '') for one in shown)} |" for name, row in rows.items()]
        lines.append("")
    faults = sorted((one for one in found if one.outcome in BAD), key=lambda one: (one.outcome, one.number))
    return "\n".join([*lines, f"{len(faults)} faults.", "", *(f"- {one}" for one in faults)]) + "\n"
