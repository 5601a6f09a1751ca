"""Columns of a data set -> examples: a conversation, a prompt and its completion, a text, or a text and its label.

Of COLUMN_SETS the first whose required columns are all present is used, so the more specific one wins: a file with
`instruction`, `output` and `text` holds instructions. `--map column=name` renames a column of the file to one of ours.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from qsvd.data.chat import check_messages, described, from_conversation, read_tools
from qsvd.data.large.mapped import MappedTokens
from qsvd.data.media import AUDIO, COLUMNS, MediaRows, gather, read_row_sound
from qsvd.data.row_files import Places, Rows, refusal
from qsvd.errors import BadInput, listing

if TYPE_CHECKING:
    from datasets import Dataset

Kind = Literal["chat", "pair", "speech", "text", "labelled"]
Row = dict[str, Any]


@dataclass(frozen=True)
class Examples:
    """Rows of one kind, in our columns.

    chat: {"messages": [{"role", "content", ...}, ...], "tools": [...] or None}
    pair: {"prompt", "completion", "tools"}, both strings or both lists of messages
    speech: {"audio", "text"}, a sound and what is said in it
    text: {"text"}
    labelled: {"text", "text_pair": str or None, "label": str or int}

    A chat or pair with images has them in "images", as media.py describes.
    """

    kind: Kind
    rows: list[Row]
    places: Places
    literal: bool = True  # strings of a pair are used as they are; else a chat template may be applied to the prompt
    columns: tuple[str, ...] = ()  # of the file, that were used

    def where(self, index: int) -> str:
        """Return the place of an example, "train.jsonl, line 3"."""
        return self.places.where(index)

    @property
    def has_images(self) -> bool:
        """Whether any example has an image."""
        return any("images" in row for row in self.rows)


@dataclass(frozen=True)
class ColumnSet:
    """Columns that make an example, and the function that makes it of a row."""

    kind: Kind
    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[Row], Row]
    literal: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """All columns of an example; those of images go with conversations and pairs."""
        return (*self.required, *self.optional, *(COLUMNS if self.kind in ("chat", "pair") else ()))

    def __str__(self) -> str:
        return " + ".join([*self.required, *(f"[{name}]" for name in self.optional)])


def recognise(
    rows: Rows,
    mapping: Mapping[str, str],
    *,
    labels: bool = True,
    columns: Sequence[str] | None = None,
    form: type | None = None,
) -> Examples:
    """Return the rows as examples of one kind, each checked. Nothing is tokenized yet.

    A column is present if any row has a value in it that is not null.

    Args:
        mapping: Column of the file -> our name for it. Only column sets with all these names are used, and a column of
            the file that already has such a name is ignored.
        labels: False reads texts with labels as texts.
        columns: Those of all rows, where these are some of them; None finds them.
        form: The type of the prompts before, str or list.

    Raises:
        BadInput: the mapping names a column that is missing, or a name that is not ours; no set fits; rows lack a
            column or have a wrong value in it (all are counted, the first few are shown).
    """
    if columns is None:
        columns = list(dict.fromkeys(name for row in rows.rows for name, value in row.items() if value is not None))
    _check_mapping(mapping, columns, rows.places.source)
    ours = {mapping.get(name, name) for name in columns}
    kinds = [known for known in COLUMN_SETS if labels or known.kind != "labelled"]
    candidates = [known for known in kinds if set(mapping.values()) <= {*known.names}]
    chosen = next((known for known in candidates if ours.issuperset(known.required)), None)
    if chosen is None:
        raise BadInput(_no_set_fits(rows.places.source, columns, mapping))
    converted, problems = [], []
    for index, row in enumerate(rows.rows):
        try:
            converted.append(_convert(chosen, row, mapping))
            form = _same_form(converted[-1], form)
        except ValueError as error:
            problems.append((rows.places.short(index), str(error)))
    if problems:
        raise BadInput(refusal(f"{rows.places.source}, read as {chosen}", "broken example", problems))
    used = [name for name in columns if mapping.get(name, name) in chosen.names]
    used = [name for name in used if name in mapping or name not in mapping.values()]
    return Examples(chosen.kind, converted, rows.places, chosen.literal, tuple(used))


def _convert(chosen: ColumnSet, row: Row, mapping: Mapping[str, str]) -> Row:
    """Return a row as an example: null values dropped, columns renamed, the rest checked by the column set."""
    present = {name: value for name, value in row.items() if value is not None}
    kept = {name: value for name, value in present.items() if name not in mapping and name not in mapping.values()}
    renamed = kept | {ours: present[column] for column, ours in mapping.items() if column in present}
    missing = [name for name in chosen.required if name not in renamed]
    if missing:
        raise BadInput(f"no {' and no '.join(missing)}")
    converted = chosen.convert(renamed)
    if COLUMNS[0] not in chosen.names:
        return converted
    column = next((name for name in COLUMNS if name in renamed), COLUMNS[0])
    return gather(converted, renamed.get(column), column)


def _same_form(row: Row, form: type | None) -> type:
    """Return str or list, the type of all prompts of a file; refuse a row with the other type."""
    found = type(row.get("prompt"))
    if form not in (None, found):
        raise BadInput(f"prompt is {described(row['prompt'])}, but in the rows before it is a {form.__name__}")
    return found


def _check_mapping(mapping: Mapping[str, str], columns: Sequence[str], source: str) -> None:
    names = list(dict.fromkeys(name for known in COLUMN_SETS for name in known.names))
    absent = [column for column in mapping if column not in columns]
    if absent:
        raise BadInput(f"--map: {source} has no column {listing(absent)}; it has {listing(columns, limit=20)}")
    unknown = [name for name in mapping.values() if name not in names]
    if unknown:
        raise BadInput(f"--map: {listing(unknown)} is not a name of qsvd; the names are {', '.join(names)}")
    twice = [name for name in names if list(mapping.values()).count(name) > 1]
    if twice:
        raise BadInput(f"--map: several columns are mapped to {listing(twice)}; map one")


def _no_set_fits(source: str, columns: Sequence[str], mapping: Mapping[str, str]) -> str:
    if {"chosen", "rejected"} <= {*columns}:
        return (
            f"{source} has pairs of answers (chosen, rejected), which qsvd train does not learn from: use TRL's "
            "DPOTrainer on qsvd.load(OUT), as docs/guide.md shows"
        )
    names = ("prompt", "completion") if len(columns) > 1 else ("text",)
    example = " ".join(f"{column}={name}" for column, name in zip(columns, names, strict=False)) or "response=output"
    mapped = f" (with --map {' '.join(f'{column}={name}' for column, name in mapping.items())})" if mapping else ""
    found = listing(columns, limit=20) if columns else "(none)"
    return (
        f"{source} has the columns {found}{mapped}, which do not make an example. "
        f"Accepted columns, [] being optional: {'; '.join(map(str, COLUMN_SETS))}; images beside a chat or pair. "
        f"Rename columns with --map COLUMN=NAME, for example --map {example}"
    )


def _text(row: Row, name: str) -> str:
    if not isinstance(row[name], str):
        raise BadInput(f"{name} is {described(row[name])}, not a text")
    return row[name]


def _from_pair(row: Row) -> Row:
    if isinstance(row["prompt"], list) or isinstance(row["completion"], list):
        sides = {name: check_messages(row[name], name) for name in ("prompt", "completion")}
    else:
        sides = {name: _text(row, name) for name in ("prompt", "completion")}
    return sides | {"tools": read_tools(row)}


def _from_instruction(row: Row) -> Row:
    """Return a pair; the input, if there is one, follows the instruction after an empty line."""
    given = _text(row, "input") if "input" in row else ""
    instruction = _text(row, "instruction")
    prompt = f"{instruction}\n\n{given}" if given.strip() else instruction
    return {"prompt": prompt, "completion": _text(row, "output"), "tools": None}


def _from_labelled(row: Row) -> Row:
    label = row["label"]
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise BadInput(f"label is {described(label)}, not a name or an integer")
    second = _text(row, "text_pair") if "text_pair" in row else None
    return {"text": _text(row, "text"), "text_pair": second, "label": label}


COLUMN_SETS = (
    ColumnSet(
        "chat",
        ("messages",),
        ("tools",),
        lambda row: {"messages": check_messages(row["messages"], "messages"), "tools": read_tools(row)},
    ),
    ColumnSet(
        "chat",
        ("conversations",),
        ("tools",),
        lambda row: {"messages": from_conversation(row["conversations"]), "tools": read_tools(row)},
    ),
    ColumnSet("speech", (AUDIO, "text"), (), read_row_sound),
    ColumnSet("pair", ("prompt", "completion"), ("tools",), _from_pair),
    ColumnSet("pair", ("instruction", "output"), ("input",), _from_instruction, literal=False),
    ColumnSet(
        "pair",
        ("question", "answer"),
        (),
        lambda row: {"prompt": _text(row, "question"), "completion": _text(row, "answer"), "tools": None},
        literal=False,
    ),
    ColumnSet("labelled", ("text", "label"), ("text_pair",), _from_labelled),
    ColumnSet("text", ("text",), (), lambda row: {"text": _text(row, "text")}),
)


# Examples as token ids.


UNTRAINED = -100  # the label that PyTorch's cross entropy ignores


class Marked(NamedTuple):
    """The tokens of one sequence, and a label for each: the token itself if it is trained, else UNTRAINED."""

    input_ids: list[int]
    labels: list[int]

    @property
    def num_trained(self) -> int:
        """Number of tokens with a loss; a causal model does not predict the first token."""
        return sum(label != UNTRAINED for label in self.labels[1:])


@dataclass(frozen=True)
class Tokenized:
    """The data of a trainer.

    Args:
        labels: For each sequence a label per token, UNTRAINED without a loss; for labelled text the index of its class
            in label_names.
        truncated: Examples that were cut at max_length.
        dropped: Those of them that were left out, because no trained token was left.
        token_types: For pairs of texts only.
        cut_tokens: Tokens after max_length, which are not used.
        columns: Columns of the file that were used.
        has_template: Whether the chat template was applied.
        media: The rows with their images or sounds, for examples that a processor reads.
    """

    kind: Kind
    input_ids: Sequence[list[int]]
    labels: Sequence[list[int]] | Sequence[int]
    places: Places
    truncated: int = 0
    dropped: int = 0
    label_names: tuple[str, ...] = ()
    token_types: list[list[int]] | None = None
    cut_tokens: int = 0
    columns: tuple[str, ...] = ()
    has_template: bool = False
    media: MediaRows | None = None

    def where(self, index: int) -> str:
        """Return the place of a sequence, "train.jsonl, line 3"."""
        return self.places.where(index)

    @cached_property
    def digest(self) -> str:
        """The SHA-256, in hex, of tokens, labels and label names, and of what a processor reads: of a list in JSON."""
        parts: list[Any] = [self.input_ids, self.labels, self.label_names]
        if self.media is not None:
            parts.append(self.media.digests)
        found = hashlib.sha256()
        for number, part in enumerate(parts):
            found.update(b", [" if number else b"[[")
            for index, one in enumerate(part):  # one by one: the text of all is longer than the tokens
                found.update(f"{', ' if index else ''}{json.dumps(one)}".encode())
            found.update(b"]")
        found.update(b"]")
        return found.hexdigest()

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all sequences."""
        return sum(map(len, self.input_ids))

    @cached_property
    def num_trained(self) -> int:
        """Number of tokens with a loss in all sequences; for labelled text, of labels."""
        if isinstance(self.labels, MappedTokens):
            return sum(int((labels[1:] != UNTRAINED).sum()) for labels in self.labels.arrays())
        return sum(1 if isinstance(label, int) else Marked([], label).num_trained for label in self.labels)

    def take(self, indexes: Sequence[int]) -> "Tokenized":
        """Return some sequences, in the order given."""
        return replace(
            self,
            input_ids=_some(self.input_ids, indexes),
            labels=_some(self.labels, indexes),
            places=self.places.take(indexes),
            token_types=self.token_types and [self.token_types[index] for index in indexes],
            media=self.media and self.media.take(indexes),
        )

    def as_dataset(self) -> "Dataset":
        """Return a data set with the columns input_ids and labels, and token_type_ids for pairs of texts."""
        from datasets import Dataset

        if isinstance(self.input_ids, MappedTokens):
            return self.input_ids.as_dataset(("input_ids", "labels"))
        columns: dict[str, Any] = {"input_ids": self.input_ids, "labels": self.labels}
        if self.token_types is not None:
            columns["token_type_ids"] = self.token_types
        return Dataset.from_dict(columns)


def _some(values: Any, indexes: Sequence[int]) -> Any:
    """Return some of the values, in the order given."""
    return values.take(indexes) if isinstance(values, MappedTokens) else [values[index] for index in indexes]
