"""For all tests: Triton's interpreter where there is no GPU; Hypothesis without deadlines (a busy machine is no
defect), with the same examples in every run but ``make fuzz``'s; one warm start."""

import os
import signal
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

# The interpreter is chosen when a function is decorated, Triton's own library included: before anything imports triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def mend_interpreter():
    """Triton 3.6's interpreter converts arrays of one element to an index, which NumPy 2.4 refuses; 3.7's does not."""
    from triton.runtime import interpreter

    plain = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


try:
    if version("triton").startswith("3.6."):
        mend_interpreter()
except PackageNotFoundError:  # no Triton: its tests are skipped
    pass

# A shell that starts the suite in the background has it ignore SIGINT, and so would every process that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("fuzz", deadline=None, print_blob=True)
settings.load_profile("ci")
FUZZ = 10
"""How many times more examples than a test asks for the profile ``fuzz`` tries."""


def pytest_configure(config):
    # Without a profile of its own a seed would be ignored: the same examples come in every run.
    seed, profile = (config.getoption(f"--hypothesis-{name}", None) for name in ("seed", "profile"))
    if seed is not None and not profile:
        settings.load_profile("fuzz")


@pytest.hookimpl(trylast=True)  # after Hypothesis has marked its tests
def pytest_collection_modifyitems(items):
    if settings.get_current_profile_name() != "fuzz":
        return
    for test in {item.function for item in items if item.get_closest_marker("hypothesis")}:
        asked = test._hypothesis_internal_use_settings  # what stands in a test's own @settings beats the profile
        more = settings(asked, max_examples=FUZZ * asked.max_examples, derandomize=False)
        test._hypothesis_internal_use_settings = more


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """run.cache of all tests, with the warm start of ``tiny.settings`` in it; one for all workers of pytest-xdist."""
    from igpo_fast.setup import set_up
    from tests.tiny import settings

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # a worker's own folder lies in that of the whole run
    with FileLock(folder / "warm-start.lock"):
        set_up(settings(folder / "run", folder / "warm-start"))
    return folder / "warm-start"
