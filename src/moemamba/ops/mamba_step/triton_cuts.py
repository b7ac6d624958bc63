"""How the kernels of one decoded token are cut, by the rows of a batch, and launched.

All choices depend on shapes alone, so that nothing is searched for at the first token.
"""

from ..kit.triton_step import Cut

WIDEST = 8192  # d_inner that these kernels are cut for; wider layers fill the GPU with ordinary products
MANY = 16  # rows from which a layer's projections are products of the library (`triton_many.py`)


# Of each kernel, by the most rows of a batch; None is any number.
CUTS: dict[str, dict[int | None, Cut]] = {
    "enter": {1: Cut(1, 8, 1024, 4), 16: Cut(16, 16, 512, 4), None: Cut(32, 32, 128, 4)},
    "scan": {16: Cut(1, 32, 0, 4), 64: Cut(2, 64, 0, 4), None: Cut(8, 64, 0, 4)},
    "leave": {1: Cut(1, 2, 1024, 4), 16: Cut(16, 16, 512, 4), None: Cut(32, 32, 128, 4)},
    "convolve": {64: Cut(1, 256, 0, 4), None: Cut(1, 512, 0, 4)},
    "share": {None: Cut(16, 0, 128, 4)},
    "widen": {None: Cut(16, 64, 0, 4)},
    "recur": {64: Cut(1, 64, 0, 4), None: Cut(2, 64, 0, 4)},
    "best": {1: Cut(1, 64, 1024, 8), 16: Cut(16, 64, 128, 4), 64: Cut(64, 128, 64, 4), None: Cut(128, 128, 64, 8)},
}


def cut(kernel: str, batch: int) -> Cut:
    """The entry of CUTS."""
    return next(how for most, how in CUTS[kernel].items() if most is None or batch <= most)
