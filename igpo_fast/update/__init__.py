"""From a batch of rollouts to new weights."""
