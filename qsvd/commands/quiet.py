"""The libraries without their bars and notes: what matters of them is said by us."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing below an error from transformers, datasets, TRL and accelerate; no warning that paging needs a GPU."""
    import datasets
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    no_bars_before = datasets.are_progress_bars_disabled()
    others = [logging.getLogger(name) for name in ("trl", "accelerate")]
    levels = [logger.level for logger in others]
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for logger in others:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU", UserWarning)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        if not no_bars_before:
            datasets.enable_progress_bars()
        for logger, level in zip(others, levels, strict=True):
            logger.setLevel(level)
