"""Records of runs, and the text of a page without a browser."""

from html.parser import HTMLParser

from qsvd.records import Step
from qsvd.report.training import RunSummary


def steps_of(count, held_out=10):
    """Steps whose loss falls, with a held-out loss every so many of them."""
    return [
        Step(
            number=number,
            loss=4 - number / count,
            grad_norm=0.5,
            learning_rate=1e-4 * (1 - number / count),
            tokens=100 * number,
            seconds=0.5 * number,
            peak_bytes=10**9,
            held_out=3.9 - number / count if number % held_out == 0 else None,
        )
        for number in range(1, count + 1)
    ]


def summary_of(**changes):
    """The summary of 40 steps."""
    known = {
        "base": "out",
        "method": "pissa",
        "learning_rate": 1e-4,
        "optimizer": "adamw",
        "trained_parameters": 311_296,
        "steps": 40,
        "tokens": 4000,
        "seconds": 20.0,
        "first_loss": 4.0,
        "last_loss": 3.0,
        "held_out_before": 3.95,
        "held_out_after": 2.9,
        "accuracy_before": None,
        "accuracy_after": None,
        "memory": {"residual": 1_500_000, "peak": 4_000_000},
        "planned": {"residual": 1_500_000, "peak": 3_500_000},
        "resident": "all",
        "moved_bytes": 0,
        "device": "cpu",
    }
    return RunSummary(**(known | changes))


class Page(HTMLParser):
    """The elements of a page with their attributes, and its texts."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    def all(self, name):
        return [attributes for tag, attributes in self.elements if tag == name]

    @property
    def text(self):
        return " ".join(self.texts)
