"""Ends that come from outside: SIGKILL at any moment, a full disk; and the memory of a long run."""

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

from attacks.campaign import Campaign, shared
from attacks.commands import SHORT, Command
from attacks.forks import Ended, Listing, listing, make_place, matches, start
from attacks.judge import REFUSALS, Found, difference, raised, result_of

KILLED = (  # commands that write
    *("quantize", "quantize table", "quantize budget", "calibrate", "allocate"),
    *("train 16-bit", "train", "train mixed", "train more", "export peft", "export lora", "export merged"),
)
FILLED = ("quantize", "calibrate", "allocate", "train 16-bit", "train", "export peft", "export lora", "export merged")
MEGABYTE = 2**20
MOST = 64  # megabytes that no command here needs
SMALL = "small"  # the folder of a place that is a disk of its own
WARM_UP = 200  # steps before memory is measured
STRIDE = 50  # steps between measurements


def kills(campaign: Campaign, numbers: Sequence[int]) -> Iterator[Found]:
    """Kill commands at random moments, run them again and compare with what an undisturbed run leaves."""
    named = {command.name: command for command in campaign.commands}
    killed = [named[name] for name in KILLED]
    for number in numbers[: len(killed)]:
        campaign.right(killed[number % len(killed)])

    def work(number: int, place: Path) -> Found:
        random, command = Random(f"{campaign.seed} kill {number}"), killed[number % len(killed)]
        right = campaign.right(command)
        make_place(place, campaign.subjects, command.inputs)
        before, moments = listing(place), [random.uniform(0, right.seconds) for _ in range(random.choice([1, 1, 2, 3]))]
        for moment in moments:
            run = start(command.words.split(), place, limit=campaign.limit)
            end = time.monotonic() + moment
            while time.monotonic() < end and not run.has_ended:
                time.sleep(0.002)
            run.kill()
        ended = start(command.words.split(), place, limit=campaign.limit).wait()
        outcome, why = _again(campaign, command, place, ended, before)
        how = f"killed after {', '.join(f'{moment:.2f}' for moment in moments)} s of {right.seconds:.2f}"
        return Found(number, command.name, "kill", how, outcome, why)

    yield from shared(numbers, campaign.places, work)


def _again(campaign: Campaign, command: Command, place: Path, ended: Ended, before: Listing) -> tuple[str, str]:
    """Return the outcome of a command that goes on after it was stopped."""
    after = listing(place)
    if lost := [name for name in before if not matches(name, command.out) and after.get(name) != before[name]]:
        return "lost", ", ".join(lost)
    if ended.is_late:
        return "hang", ""
    if ended.code:
        return "traceback", raised(ended)
    wrong = difference(command, campaign.right(command), result_of(command, place, ended, after, set()))
    return ("silent", wrong) if wrong else ("right", "")


def full_disks(campaign: Campaign) -> Iterator[Found]:
    """Run commands that write to a disk of each megabyte until they succeed; after each failure, with more space.

    Each size is tried twice: as it is, and with a disk that says that it has space, as one does that another process
    fills meanwhile.
    """
    named, place, number = {command.name: command for command in campaign.commands}, campaign.places[0], 0
    for name in FILLED:
        command = _on_small_disk(named[name])
        campaign.right(command)
        for is_honest in (True, False):
            for size in range(1, MOST):
                make_place(place, campaign.subjects, command.inputs)
                with _Disk(place / SMALL, size) as disk:
                    first = None if is_honest else _pretend
                    outcome, why, is_enough = _fill(campaign, command, place, disk, first)
                how = f"{size} MB{'' if is_honest else ', said to be more'}"
                yield Found(number, command.name, "full disk", how, outcome, why)
                number += 1
                if is_enough:
                    break


def _on_small_disk(command: Command) -> Command:
    """Return the command with all its outputs in the folder that is a disk of its own."""
    words = command.words
    for name in ("NEW", "Q", "stats.safetensors", "bits.txt"):
        for flag in ("--out", "--quantized"):
            words = words.replace(f"{flag} {name}", f"{flag} {SMALL}/{name}")
    inputs = {**command.inputs, SMALL: "empty"}
    return replace(command, name=f"{command.name}, small disk", words=words, inputs=inputs, out=(SMALL,))


class _Disk:
    """A file system in memory, in a `with` block.

    Args:
        size: Megabytes.
    """

    def __init__(self, folder: Path, size: int):
        self.folder, self.size = folder, size

    def __enter__(self) -> "_Disk":
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={self.size}m", "tmpfs", self.folder], check=True)
        return self

    def grow(self) -> None:
        """Give it all the space that a command may need."""
        subprocess.run(["mount", "-o", f"remount,size={4 * MOST}m", self.folder], check=True)

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", self.folder], check=True)


def _pretend() -> None:
    used = shutil.disk_usage(".")
    shutil.disk_usage = lambda _: used._replace(free=2**40)


def _fill(
    campaign: Campaign, command: Command, place: Path, disk: _Disk, first: Callable[[], None] | None
) -> tuple[str, str, bool]:
    """Run a command on a small disk, then again with space; return outcome, reason, and whether the disk was enough."""
    before = listing(place)
    ended = start(command.words.split(), place, limit=campaign.limit, first=first).wait()
    if ended.is_late:
        return "hang", "", False
    if ended.code == 0:
        return *_again(campaign, command, place, ended, before), True
    said = [line for line in ended.err.strip().splitlines() if line.startswith("qsvd: ")]
    if ended.code not in REFUSALS or "Traceback" in ended.err or len(said) != 1:
        return "traceback", raised(ended), False
    disk.grow()
    ended = start(command.words.split(), place, limit=campaign.limit).wait()
    outcome, why = _again(campaign, command, place, ended, before)
    return ("refused", said[0], False) if outcome == "right" else (outcome, f"with space: {why}", False)


def long_run(campaign: Campaign, steps: int) -> tuple[str, bool]:
    """Train for many steps; return memory and file handles as Markdown, and whether they stay the same."""
    command = Command("long run", f"train OUT data.jsonl --out NEW --steps {steps} --save-every 500 {SHORT}", {})
    place = campaign.places[0]
    make_place(place, campaign.subjects, {"OUT": "OUT", "data.jsonl": "data.jsonl"})
    run, measured, file = start(command.words.split(), place, limit=3600), [], place / "NEW" / "steps.jsonl"
    while not run.has_ended:
        done = file.read_bytes().count(b"\n") if file.is_file() else 0
        if done >= (measured[-1][0] if measured else 0) + STRIDE and done < steps:
            measured.append((done, *run.memory_and_files()))
        time.sleep(0.02)
    ended = run.wait()
    if ended.code:
        return f"It failed: {raised(ended)}\n", False
    late = [one for one in measured if one[0] > WARM_UP]
    slope, files = _slope(late), {one[2] for one in late}
    rows = [f"| {done} | {resident / MEGABYTE:.1f} | {number} |" for done, resident, number in measured[::4]]
    head = ["| step | resident memory (MB) | file handles |", "| ---: | ---: | ---: |"]
    verdict = f"After step {WARM_UP}: {slope:+.2f} MB in 1,000 steps, file handles {min(files)} to {max(files)}."
    return "\n".join([*head, *rows, "", verdict, ""]), slope < 1 and len(files) == 1


def _slope(measured: Sequence[tuple[int, int, int]]) -> float:
    """Return the slope of memory by least squares, megabytes in 1,000 steps."""
    steps, sizes = [one[0] for one in measured], [one[1] / MEGABYTE for one in measured]
    middle, mean = sum(steps) / len(steps), sum(sizes) / len(sizes)
    upper = sum((step - middle) * (size - mean) for step, size in zip(steps, sizes, strict=True))
    return 1000 * upper / sum((step - middle) ** 2 for step in steps)
