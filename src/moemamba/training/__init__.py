"""How a model is trained: `config` (no torch) says what, `loop` does it, `evaluate` measures, `spread` over processes.

`watch` < `update` < `run` are rooms with faces, each of which imports those before it alone.
"""
