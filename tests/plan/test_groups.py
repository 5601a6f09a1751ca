"""The experts of a stack get one codec and one rank, and one line in the table."""

import pytest

from qsvd.decompose.candidates import CandidateErrors
from qsvd.numerics.names import codec_named
from qsvd.plan.allocation import Allocation, Choice, from_text, to_text
from qsvd.plan.budget import parse_budget
from qsvd.plan.grid import grid_of
from qsvd.plan.solve import AllocationProblem, solve
from qsvd.plan.weights import plan_model
from tests.checkpoints import tiny_config

WEIGHTS = plan_model(tiny_config("MixtralForCausalLM")).weights


def test_the_program_chooses_once_for_a_stack_and_counts_every_expert():
    grid = grid_of(("nf2-32-fp16", "nf8-32-fp16"), (0, 4), 0, WEIGHTS)
    budget = parse_budget("4bits", WEIGHTS)
    problem = AllocationProblem(WEIGHTS, grid, budget, factor_bytes=2)
    errors = {
        spec.module: CandidateErrors((0, 4), ((4.0, 0.1 * number), (2.0, 0.05 * number)), 10.0, (1.0,) * 4, 9.0)
        for number, spec in enumerate(WEIGHTS, start=1)
    }
    result = solve(problem, "both", errors)
    by_group = {}
    for spec in WEIGHTS:
        by_group.setdefault(spec.group, set()).add(result.allocation.choices[spec.module])
    assert {len(choices) for choices in by_group.values()} == {1}
    assert len({next(iter(choices)) for choices in by_group.values()}) > 1
    spent = sum(result.allocation.choices[spec.module].num_bytes(spec.shape) for spec in WEIGHTS)
    assert spent == result.num_bytes <= budget.num_bytes


def test_a_table_has_a_line_for_a_stack():
    choices = {spec.module: Choice(codec_named("nf3-64-8x256" if spec.stack else "nf8-32-fp16"), 2) for spec in WEIGHTS}
    text = to_text(Allocation(choices), WEIGHTS)
    assert text.count("model.layers.0.mlp.experts.down_proj ") == 1
    assert len(text.splitlines()) == 2 + len({spec.group for spec in WEIGHTS})
    assert from_text(text, WEIGHTS, "the table").choices == choices
    with pytest.raises(ValueError, match=r"1 weights have no line: model\.layers\.1\.mlp\.experts\.down_proj"):
        from_text(text.replace("model.layers.1.mlp.experts.down_proj", "# "), WEIGHTS, "the table")
