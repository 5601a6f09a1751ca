"""What the columns of a data set mean: a conversation, a prompt and its completion, plain text, or a text to label.

Of the sets below the first whose columns are all in the file is taken, so that the more specific one wins: a file with
`instruction`, `output` and `text` holds instructions. `--map column=name` gives a column of the file one of our names.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from qsvd.data import chat as turns
from qsvd.data.row_files import Places, Rows, refusal
from qsvd.errors import BadInput, listing

if TYPE_CHECKING:
    from datasets import Dataset

Kind = Literal["chat", "pair", "text", "labelled"]
Row = dict[str, Any]


@dataclass(frozen=True)
class Examples:
    """Rows of one kind, in our columns.

    chat: {"messages": [{"role", "content", ...}, ...], "tools": [...] or None}
    pair: {"prompt", "completion", "tools"}, both strings or both lists of messages
    text: {"text"}
    labelled: {"text", "text_pair": str or None, "label": str or int}
    """

    kind: Kind
    rows: list[Row]
    places: Places
    literal: bool = True  # a pair of strings is text as it stands, not a question that a chat template may dress

    def where(self, index: int) -> str:
        """ "train.jsonl, line 3"."""
        return self.places.where(index)


@dataclass(frozen=True)
class ColumnSet:
    """Columns that together are an example, and how a row of them becomes one."""

    kind: Kind
    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[Row], Row]
    literal: bool = True

    def __str__(self) -> str:
        return " + ".join([*self.required, *(f"[{name}]" for name in self.optional)])


def recognise(rows: Rows, mapping: Mapping[str, str]) -> Examples:
    """The rows as examples of one kind; each is checked, and nothing slow has happened yet.

    A column counts as there if any row has a value in it; null is no value.

    Args:
        mapping: Column of the file -> our name for it. Only sets with all these names are then considered, and a
            column of the file that already has such a name is left aside.

    Raises:
        BadInput: the mapping names a column that is not there, or a name that is not ours; no set fits; rows lack a
            column or hold something else in it (all counted, the first few shown).
    """
    columns = list(dict.fromkeys(name for row in rows.rows for name, value in row.items() if value is not None))
    _check_mapping(mapping, columns, rows.places.source)
    ours = {mapping.get(name, name) for name in columns}
    candidates = [known for known in COLUMN_SETS if set(mapping.values()) <= {*known.required, *known.optional}]
    chosen = next((known for known in candidates if ours.issuperset(known.required)), None)
    if chosen is None:
        raise BadInput(_no_set_fits(rows.places.source, columns, mapping))
    converted, problems, form = [], [], None
    for index, row in enumerate(rows.rows):
        try:
            converted.append(_convert(chosen, _renamed(row, mapping)))
            form = _same_form(converted[-1], form)
        except ValueError as error:
            problems.append((rows.places.short(index), str(error)))
    if problems:
        raise BadInput(refusal(f"{rows.places.source}, read as {chosen}", "broken example", problems))
    return Examples(chosen.kind, converted, rows.places, chosen.literal)


def _renamed(row: Row, mapping: Mapping[str, str]) -> Row:
    """The values that are there, under our names."""
    there = {name: value for name, value in row.items() if value is not None}
    kept = {name: value for name, value in there.items() if name not in mapping and name not in mapping.values()}
    return kept | {ours: there[column] for column, ours in mapping.items() if column in there}


def _convert(chosen: ColumnSet, row: Row) -> Row:
    missing = [name for name in chosen.required if name not in row]
    if missing:
        raise BadInput(f"no {' and no '.join(missing)}")
    return chosen.convert(row)


def _same_form(row: Row, form: type | None) -> type:
    """str or list, whichever the prompts of a file are; refuses a row that has the other."""
    found = type(row.get("prompt"))
    if form not in (None, found):
        raise BadInput(f"prompt is {turns.described(row['prompt'])}, but the rows before have it as {form.__name__}")
    return found


def _check_mapping(mapping: Mapping[str, str], columns: Sequence[str], source: str) -> None:
    names = list(dict.fromkeys(name for known in COLUMN_SETS for name in (*known.required, *known.optional)))
    absent = [column for column in mapping if column not in columns]
    if absent:
        raise BadInput(f"--map: {source} has no column {listing(absent)}; it has {listing(columns, limit=20)}")
    unknown = [name for name in mapping.values() if name not in names]
    if unknown:
        raise BadInput(f"--map: {listing(unknown)} is none of our names, which are {', '.join(names)}")
    twice = [name for name in names if list(mapping.values()).count(name) > 1]
    if twice:
        raise BadInput(f"--map: several columns are mapped to {listing(twice)}; map one")


def _no_set_fits(source: str, columns: Sequence[str], mapping: Mapping[str, str]) -> str:
    mapped = f" (with --map {' '.join(f'{column}={name}' for column, name in mapping.items())})" if mapping else ""
    found = listing(columns, limit=20) if columns else "(none)"
    return (
        f"{source} has the columns {found}{mapped}, which are no examples. "
        f"Accepted, [] being optional: {'; '.join(map(str, COLUMN_SETS))}. "
        "Name columns with --map COLUMN=NAME, as in --map response=output"
    )


def _text(row: Row, name: str) -> str:
    if not isinstance(row[name], str):
        raise BadInput(f"{name} is {turns.described(row[name])}, not a text")
    return row[name]


def _from_messages(row: Row) -> Row:
    return {"messages": turns.check_messages(row["messages"], "messages"), "tools": turns.read_tools(row)}


def _from_conversations(row: Row) -> Row:
    return {"messages": turns.from_conversation(row["conversations"]), "tools": turns.read_tools(row)}


def _from_pair(row: Row) -> Row:
    if isinstance(row["prompt"], list) or isinstance(row["completion"], list):
        sides = {name: turns.check_messages(row[name], name) for name in ("prompt", "completion")}
    else:
        sides = {name: _text(row, name) for name in ("prompt", "completion")}
    return sides | {"tools": turns.read_tools(row)}


def _from_question(row: Row) -> Row:
    return {"prompt": _text(row, "question"), "completion": _text(row, "answer"), "tools": None}


def _from_instruction(row: Row) -> Row:
    """The input, where there is one, stands below the instruction after an empty line."""
    given = _text(row, "input") if "input" in row else ""
    instruction = _text(row, "instruction")
    prompt = f"{instruction}\n\n{given}" if given.strip() else instruction
    return {"prompt": prompt, "completion": _text(row, "output"), "tools": None}


def _from_labelled(row: Row) -> Row:
    label = row["label"]
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise BadInput(f"label is {turns.described(label)}, not a name or an integer")
    second = _text(row, "text_pair") if "text_pair" in row else None
    return {"text": _text(row, "text"), "text_pair": second, "label": label}


def _from_text(row: Row) -> Row:
    return {"text": _text(row, "text")}


COLUMN_SETS = (
    ColumnSet("chat", ("messages",), ("tools",), _from_messages),
    ColumnSet("chat", ("conversations",), ("tools",), _from_conversations),
    ColumnSet("pair", ("prompt", "completion"), ("tools",), _from_pair),
    ColumnSet("pair", ("instruction", "output"), ("input",), _from_instruction, literal=False),
    ColumnSet("pair", ("question", "answer"), (), _from_question, literal=False),
    ColumnSet("labelled", ("text", "label"), ("text_pair",), _from_labelled),
    ColumnSet("text", ("text",), (), _from_text),
)


# Examples as token ids, with the tokens that are trained.


UNTRAINED = -100  # the label that PyTorch's cross entropy leaves out


class Marked(NamedTuple):
    """One sequence: its tokens, and for each the token itself where it is trained or UNTRAINED."""

    input_ids: list[int]
    labels: list[int]

    @property
    def num_trained(self) -> int:
        """Labels that a causal model is trained on; it never predicts the first token."""
        return sum(label != UNTRAINED for label in self.labels[1:])


def marked(input_ids: list[int], trained: Sequence[bool]) -> Marked:
    """A sequence from its tokens and which of them are trained."""
    pairs = zip(input_ids, trained, strict=True)
    return Marked(input_ids, [token if train else UNTRAINED for token, train in pairs])


@dataclass(frozen=True)
class Tokenized:
    """What a trainer takes.

    labels holds for each sequence a label per token (UNTRAINED where there is no loss), or for labelled text the
    number of its class in label_names. truncated counts the examples that were cut at max_length, dropped those of
    them that had no trained token left and are not here. token_types is there for pairs of texts only.
    """

    kind: Kind
    input_ids: list[list[int]]
    labels: list[list[int]] | list[int]
    places: Places
    truncated: int = 0
    dropped: int = 0
    label_names: tuple[str, ...] = ()
    token_types: list[list[int]] | None = None

    def where(self, index: int) -> str:
        """ "train.jsonl, line 3"."""
        return self.places.where(index)

    @property
    def num_tokens(self) -> int:
        """Of all sequences."""
        return sum(map(len, self.input_ids))

    @property
    def num_trained(self) -> int:
        """Tokens with a loss, of all sequences; for labelled text, the labels."""
        return sum(1 if isinstance(label, int) else Marked([], label).num_trained for label in self.labels)

    def as_dataset(self) -> "Dataset":
        """Columns input_ids and labels, and token_type_ids where there are some."""
        from datasets import Dataset

        columns: dict[str, list] = {"input_ids": self.input_ids, "labels": self.labels}
        if self.token_types is not None:
            columns["token_type_ids"] = self.token_types
        return Dataset.from_dict(columns)
