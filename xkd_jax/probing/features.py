"""The pooled features of a frozen network over a whole split, in memory or in a file."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from xkd_jax import data
from xkd_jax.augment import ops
from xkd_jax.data.progress import Progress
from xkd_jax.distributed import sharding
from xkd_jax.evaluate import IMAGES_PER_DEVICE
from xkd_jax.model import Model
from xkd_jax.weights import npy_header


def create_feature_step(
    model: Model, crop_pct: float = 0.0, name: str = "pooled"
) -> Callable[..., jax.Array]:
    """A jitted step(variables, images uint8 [N, H, W, 3]) -> features [N, D], float32.

    Args:
      model: the network.
      crop_pct: `data.Split.crop_pct` of the split.
      name: of the features in `out`: "pooled", or "logits".
    """

    @jax.jit
    def step(variables: Any, images: jax.Array) -> jax.Array:
        pixels = ops.evaluated_pixels(images, model.image_size, crop_pct)
        _, out = model.forward(variables, model.preprocess(pixels))
        return out[name].astype(jnp.float32)

    return step


def compute(
    step: Callable[..., jax.Array], variables: Any, split: data.Split, mesh: Mesh
) -> np.ndarray:
    """The features [n, D] of every image of `split`, float32, in every process.

    Args:
      step: from `create_feature_step`.
      variables: the network's.
      split: the images.
      mesh: the devices.
    """
    return np.concatenate(list(_batches(step, variables, split, mesh, 0)))


def compute_to_file(
    path: Path, step: Callable[..., jax.Array], variables: Any, split: data.Split, mesh: Mesh
) -> np.ndarray:
    """As `compute`, from `path`, an .npy file that is written batch by batch.

    A file that an interrupted call has left is continued; it holds whole rows up to its end.

    Args:
      path: of the file.
      step: as for `compute`.
      variables: as for `compute`.
      split: as for `compute`.
      mesh: as for `compute`.

    Raises:
      OSError: the file can't be written, for example because the disk is full.
    """
    width = jax.eval_shape(step, variables, split.images[:1]).shape[-1]
    head = npy_header(np.dtype("<f4"), (len(split), width))
    begin, row = len(head), 4 * width
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        if file.tell() < begin:
            file.truncate(0)
            file.write(head)
            file.flush()
        done = (os.fstat(file.fileno()).st_size - begin) // row
        file.truncate(begin + done * row)  # a row that was cut off
        with Progress(f"features, {path.stem}", len(split), "images") as progress:
            progress.update(done)
            for batch in _batches(step, variables, split, mesh, done):
                file.write(batch.astype("<f4").tobytes())
                file.flush()
                os.fsync(file.fileno())
                progress.update(len(batch))
    return np.load(path)


def _batches(
    step: Callable[..., jax.Array], variables: Any, split: data.Split, mesh: Mesh, start: int
) -> Iterator[np.ndarray]:
    """The features of the images from `start` on, batch by batch; the last one is padded."""
    over_batch = sharding.over_batch(mesh)
    variables = jax.device_put(variables, sharding.replicated(mesh))
    batch_size, count = IMAGES_PER_DEVICE * mesh.shape["data"], len(split)
    for first in range(start, count, batch_size):
        indices = np.arange(first, first + batch_size)
        images = sharding.put_rows(split.images, np.minimum(indices, count - 1), over_batch)
        yield sharding.to_host(step(variables, images), mesh)[: count - first]
