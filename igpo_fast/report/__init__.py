"""Runs for people: charts, and a page of a run's curves and rollouts (docs/report.md)."""
