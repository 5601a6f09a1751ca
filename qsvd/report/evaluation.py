"""The scores of several models, as a table and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True)
class ModelScores:
    """The scores of one model on one data set, by name: perplexity, nats, kl_mean, accuracy and the like."""

    model: str
    kind: str
    values: Mapping[str, float]


FORMS = {  # value -> its row in the table, and its format; rows are in this order
    "perplexity": ("perplexity", "{:.4f}"),
    "nats": ("loss (nats / token)", "{:.5f}"),
    "label_nats": ("loss (nats / label)", "{:.5f}"),
    "kl_mean": ("mean KL divergence (nats)", "{:.6f}"),
    "kl_mean_error": ("standard error of the mean KL (nats)", "{:.6f}"),
    "kl_median": ("median KL divergence (nats)", "{:.6f}"),
    "kl_99": ("99th percentile of KL divergence (nats)", "{:.5f}"),
    "top_token_agreement": ("top-token agreement", "{:.2%}"),
    "accuracy": ("accuracy", "{:.2%}"),
    "exact_match": ("exact match", "{:.2%}"),
    "low": ("95 % interval, lower end", "{:.2%}"),
    "high": ("95 % interval, upper end", "{:.2%}"),
    "correct": ("correct examples", "{:,.0f}"),
    "total": ("examples", "{:,.0f}"),
    "unfinished": ("answers cut at the token limit", "{:,.0f}"),
    "max_new_tokens": ("token limit of an answer", "{:,.0f}"),
    "tokens": ("predicted tokens", "{:,.0f}"),
    "window": ("window (tokens)", "{:,.0f}"),
    "stride": ("stride (tokens)", "{:,.0f}"),
    "shortened": ("texts cut at the window", "{:,.0f}"),
}
KINDS = {"16-bit": "16-bit model", "split": "quantized model", "trained": "run"}


def evaluation_table(scores: Sequence[ModelScores], title: str) -> Table:
    """Return a table with a column for each model and a row for each value; values that FORMS lacks are left out."""
    heads = (f"{one.model}\n({KINDS.get(one.kind, one.kind)})" for one in scores)
    table = Table("score", *heads, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
        column.overflow = "fold"
    for name, (heading, form) in FORMS.items():
        if any(name in one.values for one in scores):
            table.add_row(heading, *(form.format(one.values[name]) if name in one.values else "" for one in scores))
    return table


def evaluation_json(scores: Sequence[ModelScores], how: Mapping[str, object]) -> dict[str, object]:
    """Return every value, not rounded, and how it was measured."""
    return {
        "how": dict(how),
        "models": [{"model": one.model, "kind": one.kind} | dict(one.values) for one in scores],
    }
