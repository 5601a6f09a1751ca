"""What was measured of several models, as a table and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True)
class ModelScores:
    """One model on one data set.

    values are by name, in the order of the table: perplexity, nats, kl_mean, accuracy and the like.
    """

    model: str
    kind: str
    values: Mapping[str, float]


FORMS = {
    "perplexity": ("perplexity", "{:.4f}"),
    "nats": ("nats / token", "{:.5f}"),
    "label_nats": ("nats / label", "{:.5f}"),
    "kl_mean": ("mean KL", "{:.6f}"),
    "kl_mean_error": ("±", "{:.6f}"),
    "kl_median": ("median KL", "{:.6f}"),
    "kl_99": ("KL 99 %", "{:.5f}"),
    "top_token_agreement": ("same top token", "{:.2%}"),
    "accuracy": ("accuracy", "{:.2%}"),
    "exact_match": ("exact match", "{:.2%}"),
    "low": ("95 % from", "{:.2%}"),
    "high": ("to", "{:.2%}"),
    "correct": ("correct", "{:,.0f}"),
    "total": ("of", "{:,.0f}"),
    "unfinished": ("cut", "{:,.0f}"),
    "max_new_tokens": ("at tokens", "{:,.0f}"),
    "tokens": ("tokens", "{:,.0f}"),
    "window": ("window", "{:,.0f}"),
    "stride": ("stride", "{:,.0f}"),
    "shortened": ("shortened", "{:,.0f}"),
}


def evaluation_table(measured: Sequence[ModelScores], title: str) -> Table:
    """One column for each model, one row for each value; what is not in FORMS is in the JSON only."""
    table = Table("", *(f"{one.model}\n{one.kind}" for one in measured), title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
        column.overflow = "fold"
    for name, (heading, form) in FORMS.items():
        if any(name in one.values for one in measured):
            cells = (form.format(one.values[name]) if name in one.values else "" for one in measured)
            table.add_row(heading, *cells)
    return table


def evaluation_json(measured: Sequence[ModelScores], how: Mapping[str, object]) -> dict[str, object]:
    """Everything, with how it was measured."""
    return {
        "how": dict(how),
        "models": [{"model": one.model, "kind": one.kind} | dict(one.values) for one in measured],
    }
