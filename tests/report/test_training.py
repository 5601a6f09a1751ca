"""The summary of a run, and its README."""

import ast
import io
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from qsvd.cli import parse
from qsvd.report.next_commands import after_train
from qsvd.report.training import RunSummary, rows, run_readme, training_tables

SUMMARY = RunSummary(
    base="some/base",
    method="pissa",
    learning_rate=2e-5,
    optimizer="adamw",
    trained_parameters=77_824,
    steps=1_250,
    tokens=123_456,
    seconds=61.728,
    first_loss=5.95751,
    last_loss=2.25,
    held_out_before=4.5,
    held_out_after=3.25,
    accuracy_before=None,
    accuracy_after=None,
    memory={"residual": 4_200_000, "peak": 1_234_567_890},
    planned={"residual": 4_300_000, "peak": 1_200_000_000},
    resident="3 of 4 blocks, the others on disk",
    moved_bytes=0,
    device="cpu",
)
CLASSIFIER = replace(SUMMARY, accuracy_before=0.5, accuracy_after=0.9375)
EXPECTED = {
    "quantized model": "some/base",
    "method": "pissa, adamw, learning rate 2e-05",
    "trained parameters": "77,824",
    "steps": "1,250",
    "tokens": "123,456 in 62 s, 2,000 per second",
    "training loss, first and last step (nats)": "5.9575, 2.2500",
    "held-out loss, before and after (nats)": "4.5000, 3.2500",
    "4-bit weights on the CPU": "3 of 4 blocks, the others on disk",
}


def shown(renderable, width=100):
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()


def test_rows_have_every_number_and_accuracy_only_of_a_classifier():
    assert dict(rows(SUMMARY)) == EXPECTED
    assert dict(rows(CLASSIFIER)) == EXPECTED | {"held-out accuracy, before and after": "50.00%, 93.75%"}


def test_a_run_without_held_out_examples_says_so():
    nothing = replace(SUMMARY, held_out_before=None, held_out_after=None)
    assert dict(rows(nothing))["held-out loss, before and after (nats)"] == "no held-out examples"


def test_the_tables_have_the_rows_and_the_memory_in_megabytes():
    text = shown(training_tables(CLASSIFIER))
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    run, memory = lines[: len(rows(CLASSIFIER))], lines[len(rows(CLASSIFIER)) :]
    assert "planned (MB)" in text
    assert "measured (MB)" in text
    assert dict(run) == dict(rows(CLASSIFIER))
    assert memory == [["residual", "4.3", "4.2"], ["peak", "1,200.0", "1,234.6"]]


def test_a_narrow_terminal_loses_nothing():
    text = shown(training_tables(replace(SUMMARY, base="/a/folder/" + "x" * 90)), width=60)
    assert text.count("x") == 90
    assert "…" not in text


def test_the_readme_has_the_rows_and_names_its_files():
    text = run_readme(CLASSIFIER, "some/run")
    found = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+) \|$", text, flags=re.M))
    del found["---"]
    assert found == dict(rows(CLASSIFIER, is_timed=False))
    for name in ("qsvd_adapter.safetensors", "steps.jsonl", "qsvd report --html", "summary.json"):
        assert f"`{name}`" in text


@pytest.mark.parametrize("forms", [(), ("merged",)])
def test_the_readme_and_the_next_commands_name_no_form_that_the_method_lacks(forms):
    text = run_readme(SUMMARY, "some/run", forms)
    assert re.findall(r"--to (\w+)", text) == [*forms]
    assert "peft" not in text.lower()
    assert ("```sh" in text) == bool(forms)
    commands = after_train("base", Path("some/run"), None, generates=True, merges=bool(forms))
    assert re.findall(r"--to (\w+)", " ".join(commands)) == [*forms]


@pytest.mark.parametrize("run", ["some/run", "with space/run", "it's"])
def test_the_readmes_code_loads_the_run_and_its_commands_export_it(run):
    text = run_readme(replace(SUMMARY, base="a 'base'"), run)
    codes = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    calls = [node for code in codes for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert [ast.unparse(call.func) for call in calls] == ["qsvd.load", "AutoPeftModelForCausalLM.from_pretrained"]
    assert [[ast.literal_eval(argument) for argument in call.args] for call in calls] == [["a 'base'"], [run]]
    assert ast.literal_eval(calls[0].keywords[0].value) == run
    (commands,) = re.findall(r"```sh\n(.*?)```", text, flags=re.S)
    lines = [shlex.split(line, comments=True) for line in commands.splitlines()]
    assert [line[0] for line in lines] == ["qsvd", "qsvd"]
    exports = [parse(line[1:]) for line in lines]
    assert [str(options.run) for options in exports] == [run, run]
    assert [(options.to, str(options.out)) for options in exports] == [
        ("peft", f"{run}-peft"),
        ("merged", f"{run}-merged"),
    ]
