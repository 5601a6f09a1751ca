"""The Markdown report, by reading it back."""

import re
from dataclasses import replace

import pytest

from qsvd.records import Coverage, WeightedError
from qsvd.report.errors import number, to_markdown, weighted_in_words


def rows_of(markdown, heading):
    """The rows of the table under a heading, as dicts from column head to cell."""
    table = markdown.split(f"\n## {heading}")[1].split("\n\n")[1]
    lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_markdown_by_layer_type_holds_the_norms_of_the_matrices(samples, header):
    rows = rows_of(to_markdown(header, samples.errors), "By layer type")
    assert [row["layer type"] for row in rows] == ["q", "down", "other", "all"]
    other, error = rows[2], samples.errors[3]
    before, after = error.before, error.after
    assert other["relative error, NF4 alone"] == number(before.frobenius / error.weight_frobenius)
    assert other["relative error, with components"] == number(after.frobenius / error.weight_frobenius)
    assert float(other["relative error, reduction (%)"]) == pytest.approx(
        100 - 100 * after.frobenius / before.frobenius, rel=1e-3
    )
    assert other["nuclear norm, NF4 alone"] == f"{before.nuclear:.3f} ± 0.03"
    assert other["nuclear norm, with components"] == f"{after.nuclear:.3f} ± 0.06"
    assert float(other["nuclear norm, reduction (%)"]) == pytest.approx(
        100 - 100 * after.nuclear / before.nuclear, rel=1e-3
    )
    assert other["spectral norm, NF4 alone"] == number(before.spectral)
    assert other["spectral norm, with components"] == number(after.spectral)
    assert float(other["spectral norm, reduction (%)"]) == pytest.approx(
        100 - 100 * after.spectral / before.spectral, rel=1e-3
    )
    assert (other["layers"], other["elements"], other["bits per element"]) == ("1", "48", "4.125")


def test_markdown_lists_the_worst_first_and_every_weight_in_the_order_given(samples, header):
    markdown = to_markdown(header, samples.errors, worst_count=2)
    assert "\n## Layers with the largest relative error (2 of 5)\n" in markdown
    shares = {f"`{e.name.removesuffix('.weight')}`": e.after.frobenius / e.weight_frobenius for e in samples.errors}
    assert [row["layer"] for row in rows_of(markdown, "Layers")] == sorted(shares, key=lambda name: -shares[name])[:2]
    every = rows_of(markdown, "Every layer")
    assert [row["layer"] for row in every] == [f"`{error.name.removesuffix('.weight')}`" for error in samples.errors]
    assert {
        key: every[0][key] for key in ("layer type", "shape (out x in)", "rank", "iteration", "bits per element")
    } == {
        "layer type": "down",
        "shape (out x in)": "6 x 9",
        "rank": "2",
        "iteration": "3",
        "bits per element": "4.500",
    }


def test_markdown_heads_with_model_method_and_coverage(samples, header):
    lines = to_markdown(header, samples.errors).splitlines()
    assert lines[:9:2] == [
        "# Quantization error of tiny",
        "Method: NF4 residual + components of rank 2; svd first, up to 5 iterations, ending with quantize.",
        "Coverage: 5 layers quantized, 231 of 1,495 elements (15.45 %).",
        "Not quantized:",
        "- `embed_tokens.weight`: 1 tensor, 1,200 elements",
    ]
    assert lines[9] == "- `layers.*.norm.weight`: 4 tensors, 64 elements"


def test_plain_quantization_and_whole_coverage_read_well(samples, header):
    plain = replace(header, rank=0, coverage=Coverage(1, 50, 50, ()))
    markdown = to_markdown(plain, samples.errors)
    assert "\nMethod: NF4 without components (rank 0).\n" in markdown
    assert "\nCoverage: 1 layer quantized, 50 of 50 elements (100.00 %).\n" in markdown
    assert "Not quantized" not in markdown
    assert "no such tensors" not in markdown
    assert "; svd first, 1 iteration, ending" in to_markdown(replace(header, iterations=1), samples.errors)


def test_weighted_errors_and_layers_that_keep_nearest_codes_are_in_sentences(samples, header):
    pairs = ((0.3, 0.1), (0.4, 0.2), (0.1, 0.3), (0.2, 0.2), (0.5, 0.4))
    errors = [
        replace(error, weighted=WeightedError(*pair, kept_nearest=number > 2))
        for number, (error, pair) in enumerate(zip(samples.errors, pairs, strict=True))
    ]
    texts = replace(header, sensitivity="both", texts=1, rounding="feedback")
    sentences = (
        "Relative error weighted by inputs and gradients of 1 text, root mean square over 5 layers: 0.3317 by NF4 "
        "alone, 0.2608 with components. Error feedback was not better in 2 of them, which keep nearest codes: "
        "layers.1.pooler.dense, layers.1.mlp.down_proj."
    )
    assert weighted_in_words(texts, errors) == sentences
    assert sentences.replace("_", r"\_") in to_markdown(texts, errors)
    assert weighted_in_words(texts, samples.errors) == ""
    method = replace(texts, rank=0, sensitivity="inputs", texts=1200).method
    assert method == "NF4 without components (rank 0), weighted by inputs of 1,200 texts, rounded with error feedback"


def test_markdown_aligns_numbers_right_in_tables_of_even_lines(samples, header):
    for table in re.findall(r"(?:^\|.*\n)+", to_markdown(header, samples.errors), flags=re.MULTILINE):
        head, rule, *rows = table.splitlines()
        assert len({len(line) for line in (head, rule, *rows)}) == 1
        words = {"layer type", "layer"}
        assert all(line.endswith(" |") and not line.endswith("  |") for line in rows)  # the last column holds numbers
        for name, mark in zip(head.split("|")[1:-1], rule.split("|")[1:-1], strict=True):
            assert mark.strip().endswith(":") == (name.strip() not in words)


def test_markdown_says_what_its_columns_mean(samples, header):
    notes = to_markdown(header, samples.errors).split("## What the columns mean")[1]
    for term in (
        "NF4 alone",
        "with components",
        "bits per element",
        "relative error",
        "nuclear norm",
        "spectral norm",
        "reduction",
    ):
        assert f"**{term}**" in notes
    assert "standard error of a stochastic estimate" in " ".join(notes.split())
    assert "depends on the spectrum" in notes
    assert "{" not in notes


def test_a_model_name_is_words_and_not_markup(samples, header):
    odd = replace(header, model="a_b*c|[red]<x>")
    assert to_markdown(odd, samples.errors).splitlines()[0] == r"# Quantization error of a\_b\*c\|\[red\]\<x\>"


def test_the_same_records_give_the_same_bytes(samples, header):
    again = replace(header, coverage=replace(header.coverage))
    assert to_markdown(header, samples.errors) == to_markdown(again, [replace(error) for error in samples.errors])
