"""The order of training examples, as a pure function of seed and step."""

import functools

import numpy as np


def batch_indices(
    num_examples: int, batch_size: int, seed: int, step: int, repeats: int = 1
) -> np.ndarray:
    """The example indices of a training step.

    Every epoch is a new permutation whose incomplete last batch is dropped. With `repeats` above 1,
    an epoch has as many steps but fewer distinct examples, each repeated consecutively (repeated
    augmentation, Hoffer et al., arXiv:1901.09335). Resuming needs only the step.

    Args:
      num_examples: the size of the training split.
      batch_size: examples per step; at most `num_examples`.
      seed: of the run; not negative.
      step: counted from 0.
      repeats: times each example appears per epoch, augmented independently.

    Returns:
      int32 [batch_size].

    Raises:
      ValueError: the batch is empty or larger than the split.
    """
    if not 0 < batch_size <= num_examples:
        raise ValueError(f"batch_size {batch_size} is not within 1..{num_examples}")
    epoch, position = divmod(step, num_examples // batch_size)
    places = np.arange(position * batch_size, (position + 1) * batch_size) // repeats
    return _permutation(num_examples, seed, epoch)[places]


@functools.lru_cache(maxsize=4)
def _permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    # Keyed by epoch, so that any epoch's stream is directly accessible; NumPy keeps Philox stable.
    key = np.array([seed, epoch], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key))
    permutation = generator.permutation(num_examples).astype(np.int32)
    permutation.flags.writeable = False  # shared by all steps of the epoch
    return permutation
