"""A run's folder, metrics rows, records, display and signals."""
