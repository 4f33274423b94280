"""From questions to rollouts: one rollout, many at once, dialects, tools."""
