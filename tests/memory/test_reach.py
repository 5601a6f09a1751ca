"""The longest sequence and the highest rank: they fit, and one more does not; and advice that was tried."""

from functools import partial

from qsvd.memory.items import Limits
from qsvd.memory.placement import FREE, Reach, advice, can_fit, explore, highest, longest, with_tokens
from tests.memory.large import GB, llama_70b, training

CARD = Limits(12 * GB, 16 * GB)
CONTEXT = 1 << 17
shallow = partial(llama_70b, layers=16)


def test_the_longest_sequence_fits_and_one_token_more_does_not():
    model = shallow(64)
    tokens = longest(model, training(), CARD, FREE, CONTEXT)
    assert 4096 < tokens < CONTEXT
    assert can_fit(model, training(tokens), CARD)
    assert not can_fit(model, training(tokens + 1), CARD)
    assert longest(model, training(), CARD, FREE, 8192) == 8192, "the context ends it"


def test_the_highest_rank_fits_and_one_more_does_not():
    rank = highest(shallow, training(2048), CARD, FREE, 1024)
    assert 64 < rank < 1024
    assert can_fit(shallow(rank), training(2048), CARD)
    assert not can_fit(shallow(rank + 1), training(2048), CARD)


def test_advice_names_changes_that_fit():
    limits = Limits(12 * GB, 64 * GB)
    run = training(2048, accumulate=4, optimizer="adamw")
    assert not can_fit(llama_70b(64), run, limits)
    said = advice(llama_70b, 64, run, limits, Reach(None, 24))
    assert "--optimizer paged_adamw_8bit fits" in said
    assert "--rank 24 fits" in said
    assert not any(sentence.startswith("--batch") for sentence in said), "it is 1 already"


def test_advice_combines_changes_where_no_single_one_is_enough():
    limits = Limits(12 * GB, 64 * GB)
    run = training(2048, batch=16, accumulate=4, optimizer="adamw", checkpointing=False)
    (said,) = advice(llama_70b, 64, run, limits, Reach(None, None))
    assert "all of these together fit" in said


def test_advice_says_when_nothing_helps():
    (said,) = advice(llama_70b, 64, training(), Limits(4 * GB, 64 * GB), Reach(None, None))
    assert "a larger GPU" in said


def test_the_table_has_every_combination():
    cells = explore(llama_70b, training(), 64 * GB, (16, 128), (1024, 4096), (8 * GB, 80 * GB))
    assert [(cell.rank, cell.tokens, cell.gpu) for cell in cells] == [
        (rank, tokens, gpu) for rank in (16, 128) for tokens in (1024, 4096) for gpu in (8 * GB, 80 * GB)
    ]
    assert [cell.share for cell in cells if cell.gpu == 80 * GB] == [1.0] * 4
    assert [cell.share for cell in cells if cell.gpu == 8 * GB][2:] == [None] * 2
    assert with_tokens(training(), 7).batch.tokens == 7
