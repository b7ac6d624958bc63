"""Text to tokens to batches; nothing about models."""
