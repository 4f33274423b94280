"""What a run keeps and shows: its folder, rows, records, signals."""
