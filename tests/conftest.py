"""Hypothesis for all tests: no deadlines (a busy machine is no defect), and the same examples in every CI run."""

import os

from hypothesis import settings

settings.register_profile("igpo", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("igpo")
