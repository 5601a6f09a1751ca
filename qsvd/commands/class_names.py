"""The classes of a 16-bit classifier, as labelled examples spell them."""

from typing import TYPE_CHECKING, Any

from qsvd.train.columns import Examples

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def class_names(config: "PreTrainedConfig", examples: Examples) -> tuple[str, ...]:
    """Its own names in the order of their numbers, or these numbers where the examples have numbers."""
    known: dict[Any, str] = dict(config.id2label or {})
    names = tuple(known[number] for number in sorted(known))
    numbers = tuple(str(number) for number in range(len(names)))
    return numbers if {str(row["label"]) for row in examples.rows} <= set(numbers) else names
