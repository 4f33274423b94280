"""Tools that a rollout can call."""
