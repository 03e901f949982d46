"""Evaluation: held-out loss, diagnostics of attention, and retrieval."""
