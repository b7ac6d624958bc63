"""What is done with models that were trained: `surgery` changes their experts and averages checkpoints."""
