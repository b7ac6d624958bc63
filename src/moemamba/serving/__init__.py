"""A server for a model, which OpenAI's clients know how to talk to. Knows the engine and the tokenizer, no layer."""
