"""From questions to rollouts: one rollout, many at once, how turns are written, tools."""
