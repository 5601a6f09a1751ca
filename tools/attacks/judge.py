"""One mutation: which file of which command, what is changed, and what is said of the outcome."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from attacks.commands import SEEN_BY_PEOPLE, Command
from attacks.files import UNREADABLE, mutations_of, swapped_with
from attacks.foreign import put_foreign
from attacks.forks import Ended, Listing, Running, listing, make_place, matches, start, walk
from attacks.pickles import CODE_RAN

GOOD = ("refused", "right", "told", "other input")
BAD = ("unnamed", "silent", "hang", "traceback", "lost")
REFUSALS = (1, 2, 3)
FOREIGN = "foreign"  # instead of the name of a file: files of somebody else in the output
WEIGHTS = {".safetensors": 6, ".factors": 1, ".residual": 1, ".json": 3, ".jsonl": 3, ".pt": 3, ".pth": 2}
WEIGHT = 4  # of other files that are read
LISTS = ("NEW/qsvd_export.json",)  # that name all files of a folder, of others too
NAMES = {  # of what is named by its digest in an identity
    "data.jsonl": ("data", "examples as tokens"),
    "RUN": ("run",),
    "OUT": ("quantized model",),
    "MIXED": ("quantized model",),
    "tiny": ("16-bit model", "another model", "tokens", "gradient norm of step"),  # a model may overflow
    "stats.safetensors": ("statistics", "gradients"),
    "template.jinja": ("chat template",),
}
RAISED = re.compile(r"^\S*(Error|Exception|Interrupt|Exit)\b.*$", re.MULTILINE)
WHERE = re.compile(r'/(qsvd/[\w/]+\.py)", line (\d+)')
NOT_FINITE = re.compile(r"\b(NaN|nan|Infinity|inf)\b")


@dataclass(frozen=True)
class Right:
    """What a command does without a mutation: what it prints, if it writes nothing, and what it leaves of its own.

    Args:
        seconds: How long it takes.
        unstable: Files that are other ones in every run.
    """

    out: str
    files: Listing
    seconds: float = 0.0
    unstable: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Found:
    """The outcome of one mutation."""

    number: int
    command: str
    target: str
    how: str
    outcome: str
    why: str = ""

    @property
    def kind(self) -> str:
        """The kind of file: its path without numbers."""
        return re.sub(r"\d+", "N", self.target)

    def __str__(self) -> str:
        why = f": {self.why}" if self.why else ""
        return f"{self.number} {self.outcome}: {self.command}; {self.target}: {self.how}{why}"


def targets_of(command: Command, subjects: Path) -> list[tuple[Command, str]]:
    """Return the files of a command that can be mutated, the important ones several times."""
    found = []
    for name, subject in sorted(command.inputs.items()):
        source = subjects / subject
        files = sorted(path for path in walk(source) if path.is_file()) if source.is_dir() else [source]
        for path in files:
            inside = "" if path == source else f"/{path.relative_to(source)}"
            weight = 1 if path.name in SEEN_BY_PEOPLE or not path.stat().st_size else WEIGHTS.get(path.suffix, WEIGHT)
            found += [(command, f"{name}{inside}")] * weight
    return found + [(command, FOREIGN)] * (8 if command.out else 0)


class Attack:
    """One mutation in a place, from its start to its outcome.

    Args:
        number: With the seed it decides everything.
        right: What the command does without a mutation.
    """

    def __init__(self, number: int, seed: int, chosen: tuple[Command, str], subjects: Path, right: Right):
        self.number, self.right, self.subjects = number, right, subjects
        self.command, self.target = chosen
        self.random = Random(f"{seed} {number}")
        self.how, self.protected, self.added, self.before = "", set[str](), set[str](), Listing()

    def begin(self, place: Path, limit: float) -> Running:
        """Make the place, change it and start the command."""
        make_place(place, self.subjects, self.command.inputs)
        if self.target == FOREIGN:
            found = put_foreign(place, self.command, self.right.files, self.random)
            self.how = found.how
            self.protected, self.added = (
                {str(path.relative_to(place)) for path in paths} for paths in (found.kept, found.added)
            )
        else:
            self.how = self._mutate(place, place / self.target)
        self.before = listing(place)
        return start(self.command.words.split(), place, limit=limit, is_bound=self.how == UNREADABLE)

    def _mutate(self, place: Path, path: Path) -> str:
        if self.random.random() < 0.02:
            copy = path.rename(place.with_name(f"{place.name}.copy"))
            path.symlink_to(copy)
            return "a link, to a copy"
        if self.random.random() < 0.1:
            others = sorted(other for other in self.subjects.rglob(path.name) if other.is_file())
            if said := swapped_with(path, others, self.random):
                return said
        while (said := self.random.choice(mutations_of(path))(path, self.random)) is None:
            pass
        return said

    def end(self, place: Path, ended: Ended) -> Found:
        """Look at what the command has done."""
        after = listing(place)
        outcome, why = self._outcome(place, ended, after)
        return Found(self.number, self.command.name, self.target, self.how, outcome, why.replace(str(place), ""))

    def _outcome(self, place: Path, ended: Ended, after: Listing) -> tuple[str, str]:
        if (place / CODE_RAN).exists():
            return "lost", "code of the file was run"
        if lost := self._lost(after):
            return "lost", ", ".join(lost)
        if ended.is_late:
            return "hang", f"{ended.seconds:.0f} s"
        if ended.code in REFUSALS and "Traceback" not in ended.err:
            return self._refusal(ended.err.strip().splitlines() or [""])
        if ended.code != 0:
            return "traceback", raised(ended)
        if NOT_FINITE.search(ended.out) and not NOT_FINITE.search(self.right.out):
            return "silent", "a result that is not finite, and exit code 0"
        return self._result(place, ended, after)

    def _result(self, place: Path, ended: Ended, after: Listing) -> tuple[str, str]:
        old = [name for name in self.before if matches(name, self.command.kept)]
        lists = LISTS if self.target == FOREIGN else ()
        links = [name for name in after if (place / name).is_symlink()]  # of the mutation
        kept = [*self.added, *lists, *links, *(name for name in old if after.get(name) == self.before[name])]
        wrong = difference(self.command, self.right, result_of(self.command, place, ended, after, self.added), kept)
        if not wrong:
            return "right", ""
        if matches(self.target, self.command.chosen):
            return "other input", ""
        said = [line for line in ended.err.splitlines() if "damaged" in line or "lacks" in line]
        line = next((line for line in said if self.target in line or self.target.rpartition("/")[0] in line), "")
        return ("told", line) if line else ("silent", wrong)

    def _lost(self, after: Listing) -> list[str]:
        own = {name for name in self.before if matches(name, self.command.out)} - self.protected
        return [name for name in self.before if name not in own and after.get(name) != self.before[name]][:4]

    def _refusal(self, said: Sequence[str]) -> tuple[str, str]:
        ours = [line for line in said if line.startswith("qsvd: ")]
        if len(ours) != 1 or said[-1] != ours[0]:
            return "unnamed", f"not one sentence: {' / '.join(said)[-300:]}"
        name = self.target.rpartition("/")[2]
        tops = self.command.out if self.target == FOREIGN else (self.target.partition("/")[0],)
        words = [name, *(top.removesuffix("*") for top in tops), *NAMES.get(tops[0], ())]
        if not any(re.search(rf"(?<![\w-]){re.escape(word)}", ours[0]) for word in words):
            return "unnamed", ours[0][:300]
        return "refused", ours[0]


def raised(ended: Ended) -> str:
    """Return the last exception in a traceback, and the last line of qsvd that it went through."""
    raised = [found[0] for found in RAISED.finditer(ended.err)] or (ended.err.strip().splitlines() or [""])
    places = WHERE.findall(ended.err)
    where = f" in {places[-1][0]}:{places[-1][1]}" if places else ""
    return f"exit code {ended.code}{where}, {raised[-1][:300]}"


def result_of(command: Command, place: Path, ended: Ended, after: Listing, others: set[str]) -> Right:
    """Return what a command has printed or left, without the files of others."""
    files = {
        name: found
        for name, found in after.items()
        if matches(name, command.out) and name not in others and found != "folder"
    }
    return Right("" if command.out else ended.out.replace(str(place), "PLACE"), files, ended.seconds)


def difference(command: Command, right: Right, found: Right, kept: Collection[str] = ()) -> str:
    """Return in words how a result differs from the right one; nothing if it does not.

    Args:
        kept: Files that are not compared.
    """
    if right.out != found.out:
        lines = zip(right.out.splitlines(), found.out.splitlines(), strict=False)
        different = next((f"{one.strip()} and {other.strip()}" for one, other in lines if one != other), "length")
        return f"prints something else: {different[:200]}"
    names = sorted(name for name in {*right.files, *found.files} if right.files.get(name) != found.files.get(name))
    names = [name for name in names if not matches(name, [*right.unstable, *kept])]
    if not command.out or not names:
        return ""
    return "other files: " + ", ".join(names[:6])
