"""Makes libraries that draw from the global random states draw from a given generator instead."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


@contextmanager
def global_draws(seed: int) -> Iterator[None]:
    """Seeds `random` and `numpy.random` within the block, and restores their states after it."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def draw_seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**32))
