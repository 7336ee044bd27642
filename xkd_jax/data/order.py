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


def batch_views(
    num_examples: int, batch_size: int, step: int, repeats: int, views: int
) -> np.ndarray:
    """The fixed views of a step's examples: every appearance of an example is its next view.

    In epoch e, counted from 0, that is view e modulo `views`; with `repeats`, the appearances
    within an epoch have different ones. The other arguments are those of `batch_indices`.

    Returns:
      int32 [batch_size].
    """
    epoch, position = divmod(step, num_examples // batch_size)
    places = np.arange(position * batch_size, (position + 1) * batch_size)
    return ((epoch * repeats + places % repeats) % views).astype(np.int32)


def view_generator(view: int, index: int) -> np.random.Generator:
    """The random numbers of a fixed view of an example, whatever the run's seed."""
    # The high bit keeps clear of the streams of runs, which begin with their seed.
    key = np.array([2**63 + view, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


@functools.lru_cache(maxsize=4)
def _permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    # Keyed by epoch, so that any epoch's stream is directly accessible; NumPy keeps Philox stable.
    key = np.array([seed, epoch], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key))
    permutation = generator.permutation(num_examples).astype(np.int32)
    permutation.flags.writeable = False  # shared by all steps of the epoch
    return permutation
