"""Text to batches of tokens: `corpora` opens what a `config` names, `batches` deals it out, `preparation` keeps it.

Tokens, not models. `config` loads no torch, and so neither does this.
"""
