"""Models trained on the same batches over seeds."""
