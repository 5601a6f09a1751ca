"""The terminal report, as rich prints it."""

import io
import re
from dataclasses import replace

import numpy as np
from rich.console import Console
from scipy.linalg import block_diag

from qsvd.records import Norms
from qsvd.report.errors import number, to_terminal


def printed(renderable, width=80, **options):
    stream = io.StringIO()
    Console(file=stream, width=width, **options).print(renderable)
    return stream.getvalue()


def large(samples):
    """The samples with names and numbers as a model of 70 B has them."""
    before, after = Norms(123.4, 45678.9, 123.4, 12.34), Norms(246.8, 91357.8, 246.8, 24.68)
    error = replace(samples.errors[0], shape=(28672, 8192), rank=128, weight_frobenius=1400.0)
    error = replace(error, before=before, after=after)
    return [replace(error, name=f"model.layers.{i}.self_attn.[q]_proj.weight", role="gate") for i in range(560)]


def test_the_terminal_shows_whole_tables_at_80_columns(samples, header):
    text = printed(to_terminal(header, large(samples)))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    rows = [line.split() for line in text.splitlines()]
    assert ["gate", "560", "131.5", "G", "4.500", "0.08814", "0.1763", "-100.0", "-100.0", "-100.0"] in rows
    assert ["nuclear,", "sum", "2.558e+07", "±", "2.9e+03", "5.116e+07", "±", "5.8e+03", "-100.0"] in rows
    assert "Layers with the largest error (5 of 560)" in text
    assert re.search(r"^model\.layers\.0\.self_attn\.\[q\]_proj +128 +4\.500 ", text, flags=re.MULTILINE)


def test_a_long_name_folds_and_loses_nothing_on_a_narrow_terminal(samples, header):
    name = "encoder.stages." + "deep." * 20 + "query.weight"
    text = printed(to_terminal(header, [replace(samples.errors[0], name=name)]), width=64)
    folded = text.split("Layers with the largest error")[1].split("─\n")[1]
    assert name.removesuffix(".weight") in "".join(line.split(" ")[0] for line in folded.splitlines())


def test_the_terminal_holds_the_model_norms_and_the_legend(samples, header):
    text = printed(to_terminal(header, samples.errors))
    weight, before, after = (
        np.linalg.norm(block_diag(*(triple[part] for triple in samples.matrices))) for part in range(3)
    )
    expected = [number(before / weight), number(after / weight), number(100 - 100 * after / before)]
    assert ["relative", "Frobenius", *expected] in [line.split() for line in text.splitlines()]
    assert "NF4 alone: W quantized without components. with components: Q + B A as stored." in " ".join(text.split())
    assert "Not quantized: layers.*.norm.weight (4 tensors, 64 elements)" in text
    assert "largest error" not in printed(to_terminal(header, samples.errors, worst_count=0))


def test_a_worse_split_is_red_unless_no_color_asks_otherwise(samples, header, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    less, more = Norms(1.0, 1.0, 0.0, 1.0), Norms(2.0, 2.0, 0.0, 2.0)
    worse = to_terminal(header, [replace(samples.errors[0], before=less, after=more)])
    better = to_terminal(header, [replace(samples.errors[0], before=more, after=less)])
    red = re.compile(r"\x1b\[[\d;]*31m *([^\x1b ]*)")
    assert set(red.findall(printed(worse, force_terminal=True))) == {"-100.0"}
    assert not red.findall(printed(better, force_terminal=True))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not red.findall(printed(worse, force_terminal=True))
    assert "\x1b" not in printed(worse)


def test_a_model_name_is_words_and_not_markup(samples, header):
    text = printed(to_terminal(replace(header, model="a_b*c|[red]<x>"), samples.errors))
    assert text.splitlines()[0] == "Quantization error of a_b*c|[red]<x>"
