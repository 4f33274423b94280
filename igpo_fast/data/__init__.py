"""Data that a run reads: questions, passages, tokenizers, the made-up world."""
