"""Which examples a training step sees, as a pure function of (seed, step)."""

import functools

import numpy as np


def batch_indices(
    num_examples: int, batch_size: int, seed: int, step: int, repeats: int = 1
) -> np.ndarray:
    """The example indices of a training step.

    Every epoch is a fresh permutation, its remainder dropped: an example comes at most once in an
    epoch, or `repeats` times side by side, and then fewer examples do (repeated augmentation,
    Hoffer et al., arXiv:1901.09335). Nothing but the step is needed to resume.

    Args:
      num_examples: the size of the training split.
      batch_size: examples a step; at most `num_examples`.
      seed: of the run; not negative.
      step: counted from 0.
      repeats: how often an example comes in its epoch, augmented anew each time.

    Returns:
      int32 [batch_size].

    Raises:
      ValueError: the batch is empty or bigger than the split.
    """
    if not 0 < batch_size <= num_examples:
        raise ValueError(f"batch_size {batch_size} is not within 1..{num_examples}")
    epoch, position = divmod(step, num_examples // batch_size)
    places = np.arange(position * batch_size, (position + 1) * batch_size) // repeats
    return _permutation(num_examples, seed, epoch)[places]


@functools.lru_cache(maxsize=4)
def _permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    # Philox is counter-based: any epoch's stream is reached at once, and NumPy keeps it stable.
    key = np.array([seed, epoch], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key))
    permutation = generator.permutation(num_examples).astype(np.int32)
    permutation.flags.writeable = False  # it is shared by every step of the epoch
    return permutation
