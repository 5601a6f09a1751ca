"""Examples as token ids, with the tokens that are trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from qsvd.train.columns import Kind
from qsvd.train.rows import Places

if TYPE_CHECKING:
    from datasets import Dataset

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
