"""The run that the others are compared with."""

import pytest

from helpers.training import Run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run = Run(folder, every=10**9)
    run.train_both()
    return folder, run
