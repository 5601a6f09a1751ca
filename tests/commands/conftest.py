"""What the tests of several commands start from."""

import pytest

from tests.checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny random checkpoint."""
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder)
    return folder
