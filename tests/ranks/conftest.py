import pytest

from tests.ranks.runs import train


@pytest.fixture(scope="session")
def alone(tmp_path_factory, cache):
    """Settings -> a finished run of one process with them."""
    runs = {}

    def run(*more):
        if more not in runs:
            runs[more] = tmp_path_factory.mktemp("alone") / "run"
            train(runs[more], cache, *more)
        return runs[more]

    return run
