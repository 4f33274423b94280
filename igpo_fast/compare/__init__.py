"""Algorithms compared: trainings from the same starts, paired statistics, a page (docs/compare.md)."""
