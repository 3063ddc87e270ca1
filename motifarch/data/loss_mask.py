"""A loss mask beside token ids in one array: an id without loss is stored as its complement, which
is negative, so that nobody who does not know of the mask takes it for a token.
"""

import numpy as np


def with_mask(input_ids: np.ndarray, loss_mask: np.ndarray) -> np.ndarray:
    """Token ids [n] and whether each is trained [n], as one array."""
    return np.where(loss_mask, input_ids, ~input_ids)


def split_mask(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [n] and whether each is trained [n], of what `with_mask` gave."""
    loss_mask = stored >= 0
    return np.where(loss_mask, stored, ~stored), loss_mask
