"""Names and paths from outside, as Markdown, words of a shell and texts of Python: judged by the readers of these."""

import ast
import subprocess
from dataclasses import replace

import pytest
from markdown_it import MarkdownIt

from qsvd.records import Coverage, LeftTensors
from qsvd.report.card import code, literal, markdown, shell
from qsvd.report.errors import to_markdown
from qsvd.report.readme import readme
from qsvd.report.training import run_readme
from tests.report.test_training import SUMMARY

EVIL = "a|b\n# c<script>[/b](x)\"'`: $(touch X)\x1b[31m``~~*_\\| &lt; \r\n```\n- d\u202e"
NAMES = [EVIL, "`", "a`|``b`", "| --- |", "![x](http://y)", "\\|", "-", "plain.name_0", "[a]: http://b"]
MARKDOWN = MarkdownIt("commonmark").enable("table").enable("strikethrough")


def shown(name):
    """A name in one line, with its signs that steer a terminal as escapes of Python."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in name)


def parts(text):
    """Kind and content of every inline piece, and the kinds of the blocks."""
    blocks = MARKDOWN.parse(text)
    inline = [piece for block in blocks for piece in block.children or ()]
    return [(piece.type, piece.content) for piece in inline], [block.type for block in blocks]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_one_piece_of_code_in_a_line_and_in_a_cell(name):
    pieces, blocks = parts(f"x {code(name)} y")
    assert (pieces, blocks[0]) == ([("text", "x "), ("code_inline", shown(name)), ("text", " y")], "paragraph_open")
    pieces, blocks = parts(f"| a | b |\n| - | - |\n| {code(name, in_table=True)} | 1 |\n")
    assert pieces[2:] == [("code_inline", shown(name)), ("text", "1")]
    assert blocks.count("td_open") == 2


@pytest.mark.parametrize("name", NAMES)
def test_words_are_shown_as_they_are_in_a_heading_and_in_a_cell(name):
    words = shown(" ".join(name.split()))
    for text in (f"# Model {markdown(name)}\n", f"| a |\n| - |\n| Model {markdown(name)} |\n"):
        pieces, blocks = parts(text)
        pieces = [piece for piece in pieces if piece != ("text", "a")]
        assert {kind for kind, _ in pieces} <= {"text", "text_special"}
        assert "".join(content for _, content in pieces) == f"Model {words}"
        assert blocks.count("heading_open") + blocks.count("tbody_open") == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_word_of_a_shell_and_a_text_of_python_are_the_name_in_one_line(name):
    line = shell("printf", "%s.", name, "b c")
    assert len(line.splitlines()) == len(literal(name).splitlines()) == 1
    assert subprocess.run(["bash", "-c", line], capture_output=True, check=True).stdout.decode() == f"{name}.b c."
    assert ast.literal_eval(literal(name)) == name


def test_pages_keep_their_form_whatever_the_model_and_its_tensors_are_called(samples, header):
    def pages(name):
        left = Coverage(5, 9, 10, (LeftTensors(name, 1, 2),), unknown=(LeftTensors(name, 1, 2),))
        head = replace(header, model=name, coverage=left)
        errors = [replace(samples.errors[0], name=name), *samples.errors[1:]]
        quantization = {"llm_int8_skip_modules": ["lm_head"]}
        yield to_markdown(head, errors)
        yield readme(head, name, "LlamaForCausalLM", quantization, {"layers.0.up_proj": 64})
        yield run_readme(replace(SUMMARY, base=name), name)

    for page, plain in zip(pages(EVIL), pages("plain"), strict=True):
        (pieces, blocks), (expected, kinds) = parts(page), parts(plain)
        assert blocks == kinds
        assert {kind for kind, _ in pieces} <= {kind for kind, _ in expected} | {"text_special"}
        assert [one for one in page if not one.isprintable() and one != "\n"] == []
