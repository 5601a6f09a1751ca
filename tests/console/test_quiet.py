"""What is silenced speaks again afterwards."""

import logging
from contextlib import suppress

import datasets
import pytest
from transformers.utils import logging as transformers_logging

from qsvd.console.progress import quiet


def state():
    return (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
        datasets.are_progress_bars_disabled(),
        [logging.getLogger(name).level for name in ("trl", "accelerate")],
    )


@pytest.mark.parametrize("bars", [True, False])
def test_the_libraries_are_silent_inside_and_as_before_outside(bars):
    outside = state()
    (transformers_logging.enable_progress_bar if bars else transformers_logging.disable_progress_bar)()
    (datasets.enable_progress_bars if bars else datasets.disable_progress_bars)()
    try:
        before = state()
        with suppress(KeyError), quiet():
            assert state() == (logging.ERROR, False, True, [logging.ERROR] * 2)
            raise KeyError
        assert state() == before
    finally:
        (transformers_logging.enable_progress_bar if outside[1] else transformers_logging.disable_progress_bar)()
        (datasets.disable_progress_bars if outside[2] else datasets.enable_progress_bars)()
