"""A gain: the share of what was left to find out, instead of the increase of the answer's probability.

igpo-fast train --config configs/quickstart.yaml algorithm.gain=examples/gain.py:share
"""

import numpy as np


def share(rollout, values, baselines):
    """Of turns 1 .. T-1, from v_0 .. v_{T-1}, which are probabilities (algorithm.basis=prob)."""
    return np.diff(values) / np.maximum(1 - values[:-1], 0.01)
