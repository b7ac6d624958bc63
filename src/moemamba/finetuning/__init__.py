"""Models taken further: fine-tuned on conversations, dense ones made into mixtures, experts changed (`surgery`)."""
