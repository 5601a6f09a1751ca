"""A plan as tables and as JSON: every number in its place."""

import io
from dataclasses import replace

from rich.console import Console

from qsvd.memory.block_bytes import Batch
from qsvd.memory.duration import QuantizeTime, Rate, Speed, StepTime
from qsvd.memory.items import Item, Limits, MemoryPlan, Placement
from qsvd.memory.placement import Cell, Placed, Reach
from qsvd.memory.training import Training
from qsvd.report.planning import (
    Answer,
    QuantizeAnswer,
    ServeAnswer,
    TrainAnswer,
    headline,
    lack,
    memory_table,
    plan_json,
    plan_tables,
)

ITEMS = (
    Item("residual codes", gpu=6_500_000_000),
    Item("pages", host=28_250_000_000),
    Item("base", disk=41_000_000_000),
    Item("steps", host=2240),
)
FITS = MemoryPlan("train", ITEMS, Limits(8 * 10**9, 64 * 10**9), ("One note.",))
LACKS = MemoryPlan("serve", ITEMS, Limits(6 * 10**9, 64 * 10**9), ("One note.", "Another."))
RUN = Training(Batch(1024, 4, is_masked=True, checkpointing=True, device="cuda"), 1, "adamw")
SPEED = Speed(Rate(1e14), Rate(25e9, "given"), Rate(3e9))


def shown(what):
    console = Console(file=io.StringIO(), width=100)
    console.print(what)
    return console.file.getvalue()


def rows(text):
    """The cells of every line of a table, by its first."""
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    return {cells[0]: cells[1:] for cells in lines}


def answer_of(train, **changes):
    parts = {"quantize": None, "train": train, "serve": None, "cells": (), "blocks": 80, "speed": SPEED}
    parts |= {"what": "rank 7", "notes": ()}
    return Answer(**(parts | changes))


def train_of(memory, *, placement=Placement(20, "disk", embeddings_on_host=True), advice=()):  # noqa: B008  # frozen
    step = StepTime(compute=9.0, decode=1.0, transfer=4.0, tokens=4096)
    return TrainAnswer(Placed(placement, memory), Reach(8192, None), advice, step, RUN)


def test_the_table_has_every_item_the_total_the_limit_and_what_is_left():
    found = rows(shown(memory_table(FITS)))
    assert found["residual codes"] == ["6.500", "", ""]
    assert found["offloaded blocks"] == ["", "28.250", ""]
    assert found["steps"] == ["", "2e-06", ""], "small, and not nothing"
    assert found["total"] == ["6.500", "28.250", "41.000"]
    assert found["limit"] == ["8.000", "64.000", ""]
    assert found["left"] == ["1.500", "35.750", ""]


def test_the_title_says_what_is_too_little():
    assert "qsvd train: fits" in shown(memory_table(FITS))
    assert "generating text: does not fit: too little GPU memory" in " ".join(shown(memory_table(LACKS)).split())
    assert lack(LACKS) == "generating text needs 500 MB more GPU memory"


def test_without_limits_there_is_nothing_left_to_say():
    found = rows(shown(memory_table(MemoryPlan("train", ITEMS, Limits()))))
    assert found.keys() == {"residual codes", "offloaded blocks", "quantized model", "steps", "total"}


def test_what_a_placement_means_is_said():
    text = shown(plan_tables("m", answer_of(train_of(FITS, advice=("--rank 8 fits",)))))
    for line in (
        "blocks that stay on the GPU: 20 of 80 (25%)",
        "the other blocks are copied to the GPU from disk when needed",
        "the embeddings stay in CPU memory",
        "longest sequence that fits (tokens): 8,192",
        "highest rank that fits: none",
        "estimated time: 10 s per step, 410 tokens per second",
        "advice: --rank 8 fits",
        "- One note.",
    ):
        assert line in text
    assert "activation checkpoints" not in text


def test_nothing_is_said_to_be_copied_when_all_blocks_stay():
    text = shown(plan_tables("m", answer_of(train_of(FITS, placement=Placement(80)))))
    assert "blocks that stay on the GPU: 80 of 80 (100%)" in text
    assert "when needed" not in text
    offloaded = Placement(80, activation_offload=True)
    assert "activation checkpoints are kept in CPU memory" in shown(
        plan_tables("m", answer_of(train_of(FITS, placement=offloaded)))
    )


def test_a_note_is_said_once():
    serve = ServeAnswer(Placed(Placement(80), LACKS), 0.0)
    text = shown(plan_tables("m", answer_of(train_of(FITS), serve=serve, notes=("First.",))))
    assert text.count("- One note.") == text.count("- Another.") == text.count("- First.") == 1


def test_splitting_has_its_time():
    short, long = (
        shown(plan_tables("m", answer_of(None, quantize=QuantizeAnswer(FITS, QuantizeTime(compute, 60, 20)))))
        for compute in (30, 580)
    )
    assert "estimated time: 80 s (computing 30 s while reading 60 s, then writing 20 s" in short
    assert "estimated time: 10 min (computing 580 s" in long
    assert "assumed and given: 100 TFLOP/s, CPU to GPU 25 GB/s, disk 3 GB/s" in " ".join(long.split())


def test_a_cell_is_a_percentage_or_no():
    cells = (
        Cell(16, 1024, 24 * 10**9, 0.254, offloads=False),
        Cell(16, 1024, 8 * 10**9, None, offloads=True),
        Cell(64, 1024, 24 * 10**9, 1.0, offloads=True),
        Cell(64, 1024, 8 * 10**9, 0.0, offloads=False),
    )
    text = shown(plan_tables("m", answer_of(None, cells=cells)))
    assert rows(text)["16"] == ["1,024", "no", "25"]
    assert rows(text)["64"] == ["1,024", "0", "100*"]
    assert "8 GB" in text
    assert "*: with activation checkpoints in CPU memory" in text


def test_the_document_has_bytes_and_all_that_is_derived():
    cells = (Cell(16, 1024, 24 * 10**9, None, offloads=False),)
    serve = ServeAnswer(Placed(Placement(3), LACKS), 0.77)
    found = plan_json(
        "m",
        answer_of(train_of(FITS), serve=serve, quantize=QuantizeAnswer(FITS, QuantizeTime(5.0, 2.0, 1.0)), cells=cells),
    )
    assert found["train"]["total"] == {"gpu": 6_500_000_000, "host": 28_250_002_240, "disk": 41_000_000_000}
    assert found["train"]["left"]["gpu"] == 1_500_000_000
    assert found["train"]["fits"]
    assert not found["serve"]["fits"]
    assert found["serve"]["placement"]["resident"] == 3
    assert found["serve"]["page_seconds"] == 0.77
    assert found["what"] == "rank 7"
    assert found["train"]["placement"]["pages"] == "disk"
    assert (found["train"]["longest_tokens"], found["train"]["highest_rank"]) == (8192, None)
    assert found["train"]["step"]["seconds"] == 10.0
    assert found["quantize"]["time"] == {"compute": 5.0, "read": 2.0, "write": 1.0}
    assert found["explore"][0]["share"] is None
    assert found["speed"]["link"] == {"value": 25e9, "source": "given"}


def test_what_was_planned_stands_first_and_pages_cost_generating_its_time():
    text = shown(plan_tables("m", answer_of(None, serve=ServeAnswer(Placed(Placement(3), LACKS), 0.77))))
    assert text.startswith("m: rank 7\n")
    assert "estimated time: at least 0.77 s per token to copy weights" in text
    still = shown(plan_tables("m", answer_of(None, serve=ServeAnswer(Placed(Placement(80), LACKS), 0.0))))
    assert "per token" not in still


def test_without_limits_nothing_is_said_to_fit():
    text = " ".join(shown(plan_tables("m", answer_of(train_of(replace(FITS, limits=Limits()))))).split())
    assert "qsvd train: give --gpu and --host to see whether it fits" in text
    assert "that fits" not in text


def test_the_first_line_says_what_fits_how_long_it_takes_and_what_to_change():
    run = replace(train_of(FITS), steps=1260)
    assert headline(answer_of(run)) == (
        "Fits: 6.5 of 8.0 GB on the GPU, batch 4 x 1024, about 3.5 h at the assumed speed"
    )
    given = replace(SPEED, flops=Rate(1e14, "given"))
    assert headline(answer_of(run, speed=given)).endswith(", about 3.5 h")
    assert headline(answer_of(train_of(FITS))).endswith(", batch 4 x 1024"), "no time without a number of steps"
    lacking = replace(FITS, limits=Limits(6 * 10**9, 64 * 10**9))
    assert headline(answer_of(train_of(lacking, advice=("--rank 8 fits", "--batch-size 1 fits")))) == (
        "Does not fit: 6.5 of 6.0 GB on the GPU, batch 4 x 1024: try --rank 8 or --batch-size 1"
    )
    serve = ServeAnswer(Placed(Placement(3), LACKS), 0.7)
    assert headline(answer_of(train_of(FITS), serve=serve)) == (
        "Does not fit: 6.5 of 6.0 GB on the GPU for generating text"
    )
    free = replace(FITS, limits=Limits())
    assert headline(answer_of(train_of(free))).endswith(
        "; no limit is known: give --gpu and --host to see whether it fits"
    )
