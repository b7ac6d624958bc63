"""Models taken further: fine-tuned on conversations, and dense ones made into mixtures of experts."""
