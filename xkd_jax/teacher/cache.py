"""A teacher's cache: its identity, and how it is written and read."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xkd_jax.augment import fixed
from xkd_jax.data.decode import decode_crop
from xkd_jax.data.encoded import EncodedImages
from xkd_jax.data.loader import DeviceLoader, HostLoader, Order
from xkd_jax.data.order import view_generator
from xkd_jax.data.source import Split
from xkd_jax.distiller import Distiller
from xkd_jax.distributed import processes, sharding
from xkd_jax.errors import UserError
from xkd_jax.reporting.logger import Progress, say
from xkd_jax.teacher.forward import create_teacher_fn
from xkd_jax.teacher.loader import CachedLoader
from xkd_jax.teacher.plan import Plan, plan
from xkd_jax.teacher.store import Store, ViewWriter, is_full

FORMAT = 1  # increased when the views or the files change
_EVERY = 10.0  # seconds between two lines about the progress
_POLL = 2.0  # seconds between two looks for what process 0 writes


@dataclasses.dataclass(frozen=True, eq=False)
class TeacherCache:
    """The outputs of a teacher that a method reads, for V fixed views of a split, in files.

    Attributes:
      distiller: the teacher, the method and the augmentation.
      split: the training split.
      root: the folder of all caches, `config.teacher.cache`; each has a folder in it.
      views: V.
      batch_size: images per forward pass.
      side: of the images before augmentation, pixels.
      crop_scale: as for `HostLoader`.
    """

    distiller: Distiller
    split: Split
    root: Path
    views: int
    batch_size: int
    side: int
    crop_scale: tuple[float, float]

    @functools.cached_property
    def plan(self) -> Plan:
        """The outputs to cache.

        Raises:
          UserError: the method reads something that can't be cached.
        """
        return plan(self.distiller)

    @functools.cached_property
    def recipe(self) -> dict[str, Any]:
        """Everything that the teacher's outputs depend on; can be saved as JSON."""
        teacher, split = self.distiller.teacher, self.split
        assert teacher is not None
        if isinstance(split.images, EncodedImages):
            crop = {"side": self.side, "scale": list(self.crop_scale)}
            images: dict[str, Any] = split.identity | {"random_crop": crop}
        else:  # labels make no difference
            pixels = hashlib.sha256(np.ascontiguousarray(split.images).data).hexdigest()
            images = {"examples": len(split), "pixels": pixels}
        return {
            "what": "outputs of a frozen teacher, one .npy file per output and view; the first "
            "axis is the image's number in the training split",
            "format": FORMAT,
            "teacher": {
                "model": teacher.name,
                "args": teacher.args,
                "fingerprint": teacher.fingerprint,
                "image_size": teacher.image_size,
                "mean": list(teacher.mean),
                "std": list(teacher.std),
                "class_order": list(teacher.class_order),
                "dtype": jnp.dtype(getattr(teacher.module, "dtype", jnp.float32)).name,
            },
            "images": images,
            "views": fixed.recipe(
                self.distiller.augment, self.side, self.distiller.method.multi_view
            ),
        }

    @functools.cached_property
    def store(self) -> Store:
        """The files; the folder is named by a hash of `recipe`."""
        text = json.dumps(self.recipe, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        return Store(self.root / name, len(self.split))

    def check(self) -> None:
        """Checks that the outputs can be cached and fit on the disk.

        Raises:
          UserError: names the numbers and the remedy.
        """
        needed = self.store.bytes_to_write(self.plan, self.views)
        folder = next(path for path in (self.root, *self.root.parents) if path.exists())
        free = shutil.disk_usage(folder).free
        if needed > free and processes.is_first():
            each = self.plan.bytes_per_view * len(self.split)
            raise UserError(
                f"teacher.cache={self.root} needs {_gigabytes(needed)} more, but only "
                f"{_gigabytes(free)} are free; decrease teacher.cache_views={self.views} (each "
                f"view takes {_gigabytes(each)}), or choose another folder."
            )

    def is_complete(self) -> bool:
        """Whether all files are there."""
        store, plan = self.store, self.plan
        return not (store.missing(plan, self.views) or store.missing_constants(plan))

    def fill(self) -> None:
        """Writes the missing files; resumes where an interrupted call stopped.

        Of several processes the first one writes, on its own devices; the others wait.

        Raises:
          UserError: the disk is full, or the teacher's outputs can't be stored as float16.
        """
        if self.is_complete():
            return
        if not processes.is_first():
            while not self.is_complete():
                time.sleep(_POLL)
            return
        self.store.create(self.recipe)
        folder = self.store.folder
        with self.store.lock(lambda: say(f"another process writes {folder}; waiting for it ...")):
            if self.is_complete():
                return
            self.check()
            say(
                f"writing the teacher's {', '.join([*self.plan.rows, *self.plan.constants])} "
                f"({len(self.split):,} images, views: {self.views}, "
                f"{_gigabytes(self.store.bytes_to_write(self.plan, self.views))}) to {folder} ..."
            )
            try:
                _Writer(self).run()
            except OSError as error:
                if not is_full(error):
                    raise
                raise UserError(
                    f"the disk is full, with the teacher's cache in {folder} unfinished; free "
                    f"{_gigabytes(self.store.bytes_to_write(self.plan, self.views))}, then run the "
                    "same command again to continue."
                ) from error

    @functools.cached_property
    def constants(self) -> dict[str, jax.Array]:
        """Outputs that are the same for all images, on the mesh."""
        arrays = self.store.constants(self.plan)
        return sharding.put(arrays, sharding.replicated(self.distiller.mesh))

    def loader(self, loader: DeviceLoader | HostLoader, order: Order) -> CachedLoader:
        """The batches of `loader`, whose order is `order`, with the cached rows.

        Raises:
          UserError: a file is damaged.
        """
        self.store.create(self.recipe)
        maps = self.store.arrays(self.plan, self.views)
        return CachedLoader(loader, order, maps, self.distiller.mesh)

    def row_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The cached rows of a batch, as shapes."""
        return {
            name: jax.ShapeDtypeStruct((batch_size, *row.shape), row.dtype)
            for name, row in self.plan.rows.items()
        }


class _Writer:
    """Runs the teacher over the missing views of a cache."""

    def __init__(self, cache: TeacherCache):
        self._cache = cache
        # Process 0 may have some of the mesh's devices only.
        mesh = sharding.create_mesh(jax.local_devices())
        self._distiller = dataclasses.replace(cache.distiller, mesh=mesh)
        self._batch = -(-cache.batch_size // mesh.size) * mesh.size
        self._sharding = sharding.over_batch(mesh)

    def run(self) -> None:
        cache, store = self._cache, self._cache.store
        missing = store.missing(cache.plan, cache.views)
        if constants := store.missing_constants(cache.plan):
            found = self._forward(constants)(*self._inputs(np.arange(self._batch), 0))
            for name, array in found.items():
                store.write_constant(name, np.asarray(array, np.float32))
        writers: dict[int, ViewWriter] = {}
        with contextlib.ExitStack() as stack:
            for view, names in missing.items():
                writers[view] = ViewWriter(store, cache.plan, names, view)
                stack.callback(writers[view].close)
            total = len(missing) * -(-len(cache.split) // self._batch)
            start = sum(writer.done // self._batch for writer in writers.values())
            bar = Progress("teacher cache", start, total, self._batch)
            stack.callback(bar.close)
            report = _reporter(bar, start, total)
            for view, writer in writers.items():
                self._write_view(view, missing[view], writer, report)

    def _write_view(
        self, view: int, names: list[str], writer: ViewWriter, report: Callable[[], None]
    ) -> None:
        count, forward = len(self._cache.split), self._forward(names)
        pending: tuple[int, dict[str, jax.Array]] | None = None
        try:
            # The device computes a batch while the host writes the one before.
            for images in [*range(writer.done, count, self._batch), None]:
                ahead = None
                if images is not None:
                    indices = np.arange(images, images + self._batch)
                    used = min(self._batch, count - images)
                    ahead = used, forward(*self._inputs(np.minimum(indices, count - 1), view))
                if pending is not None:
                    writer.write(self._checked(*pending))
                    report()
                pending = ahead
            writer.finish()
        except BaseException:
            with contextlib.suppress(OSError):
                writer.sync()
            raise

    def _inputs(self, indices: np.ndarray, view: int) -> tuple[Any, ...]:
        """The teacher's variables, and images, indices and views on the devices."""
        indices = np.minimum(indices, len(self._cache.split) - 1).astype(np.int32)
        batch = self._images(indices, view), indices, np.full_like(indices, view)
        return self._distiller.teacher_variables, *sharding.put(batch, self._sharding)

    def _images(self, indices: np.ndarray, view: int) -> np.ndarray:
        """The images before augmentation, uint8 [N, H, W, 3]."""
        cache, images = self._cache, self._cache.split.images
        if not isinstance(images, EncodedImages):
            return images[indices]

        def crop(index: int) -> np.ndarray:
            image, _, name = images.examples[index]
            rng = view_generator(view, index)
            return decode_crop(image, rng, cache.side, cache.crop_scale, name=name)

        return np.stack(list(_pool().map(crop, indices.tolist())))

    def _forward(self, names: list[str]) -> Callable[..., dict[str, jax.Array]]:
        """Jitted: the teacher's outputs of these names, as they are stored."""
        distiller, rows = self._distiller, self._cache.plan.rows
        teacher, method = distiller.teacher, distiller.method
        assert teacher is not None

        @jax.jit
        def forward(variables, images, index, view):
            keys = fixed.view_keys(view, index)
            seen, _ = fixed.shared_view(distiller.augment, keys, images, method.multi_view)
            out = create_teacher_fn(distiller, variables)(teacher.preprocess(seen))
            return {n: out[n].astype(rows[n].dtype if n in rows else jnp.float32) for n in names}

        return forward

    def _checked(self, used: int, outputs: dict[str, jax.Array]) -> dict[str, np.ndarray]:
        """The first `used` rows, on the host.

        Raises:
          UserError: a number isn't finite, at least as float16.
        """
        arrays = {name: np.asarray(array)[:used] for name, array in outputs.items()}
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise UserError(
                    f"the teacher's {name} is not finite or exceeds 65504, the largest float16, "
                    "which teacher.cache stores; train with teacher.cache=''."
                )
        return arrays


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count())  # decoders release the GIL


def _reporter(bar: Progress, start: int, total: int) -> Callable[[], None]:
    """A function to call after each batch: it shows the speed and the time left."""
    steps: Iterator[int] = iter(range(start + 1, total + 1))
    shown = [time.monotonic()]

    def report() -> None:
        step = next(steps, total)
        bar.update(step)
        if time.monotonic() > shown[0] + _EVERY:
            shown[0] = time.monotonic()
            bar.show(step, {})

    return report


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
