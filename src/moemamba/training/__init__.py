"""Training: text to tokens to batches, loss, optimiser, the loop and its checkpoints."""
