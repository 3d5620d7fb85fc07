"""Runnable studies: the model, the data, one training run, and the comparison that the demo shows."""
