"""The directory of a training run."""
