"""igpo-fast: reinforcement learning for multi-turn agents with information-gain turn rewards."""

__version__ = "0.1.0"
