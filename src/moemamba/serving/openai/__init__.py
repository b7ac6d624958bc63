"""What OpenAI's clients send and expect: bodies, answers, whole or as they come."""
