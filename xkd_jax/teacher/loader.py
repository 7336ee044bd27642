"""Training batches with the cached outputs of the teacher."""

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from xkd_jax.data.loader import DeviceLoader, HostLoader, Order
from xkd_jax.distributed import sharding
from xkd_jax.teacher.forward import CACHED


class CachedLoader:
    """Another loader's batches, with rows of the cache that are read during the previous step.

    Attributes:
      arrays: the other loader's.
    """

    def __init__(
        self,
        loader: DeviceLoader | HostLoader,
        order: Order,
        maps: dict[str, list[np.ndarray]],
        mesh: Mesh,
    ):
        """Reads nothing yet.

        Args:
          loader: with the images.
          order: of the examples.
          maps: for each output, an array [n, ...] per view, such as a memory map.
          mesh: where batches go.
        """
        self.arrays = loader.arrays
        self._loader, self._order, self._maps = loader, order, maps
        self._sharding = sharding.over_batch(mesh)

    def batches(self, start: int) -> Iterator[dict[str, Any]]:
        """The batches of the steps from `start` on, with the rows under `teacher.CACHED`."""
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self._read, start)
            for step, batch in enumerate(self._loader.batches(start), start):
                rows = ahead.result()
                ahead = pool.submit(self._read, step + 1)
                yield batch | {CACHED: rows}

    def _read(self, step: int) -> dict[str, jax.Array]:
        """The rows of a step's examples; each process reads those of its own devices."""
        indices, views = self._order.indices(step), self._order.view(step)

        def read(maps: list[np.ndarray], place: Any) -> np.ndarray:
            wanted, of_view = indices[place[0]], views[place[0]]
            found = np.empty((len(wanted), *maps[0].shape[1:]), maps[0].dtype)
            for view in np.unique(of_view):
                here = of_view == view
                found[here] = maps[view][wanted[here]]
            return found

        return {
            name: jax.make_array_from_callback(
                (len(indices), *maps[0].shape[1:]),
                self._sharding,
                functools.partial(read, maps),
            )
            for name, maps in self._maps.items()
        }
