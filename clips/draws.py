"""Random numbers for libraries that draw from the global states, from a given generator instead."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


@contextmanager
def global_draws(seed: int) -> Iterator[None]:
    """Inside, `random` and `numpy.random` draw what `seed` decides; outside they go on as if nothing was."""
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
