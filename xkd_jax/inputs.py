"""The inputs of an experiment's training step: batches, and the teacher or its cached outputs."""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from xkd_jax import data
from xkd_jax.config import Config
from xkd_jax.data.detection_loader import MASK_SIZE, DetectionLoader, detection_batch_shapes
from xkd_jax.data.detection_split import DetectionSplit
from xkd_jax.data.encoded import EncodedImages
from xkd_jax.data.loader import DeviceLoader, HostLoader, Order, batch_shapes, create_loader
from xkd_jax.distiller import Distiller
from xkd_jax.distributed import sharding
from xkd_jax.reporting.logger import say
from xkd_jax.teacher.cache import TeacherCache
from xkd_jax.teacher.forward import CACHED
from xkd_jax.teacher.loader import CachedLoader

AnySplit = Any  # a `data.Split`; of a detector a `DetectionSplit`


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """What a training step reads.

    Attributes:
      distiller: the networks, the method, the optimizers and the training step.
      train: the split to train on.
      config: the config that both were created from.
    """

    distiller: Distiller
    train: AnySplit
    config: Config

    @property
    def mesh(self) -> Mesh:
        """The devices."""
        return self.distiller.mesh

    @property
    def order(self) -> Order:
        """The order of the training examples."""
        config = self.config
        views = config.teacher.cache_views
        seed = config.seed if config.data.seed < 0 else config.data.seed
        return Order(len(self.train), config.batch_size, seed, config.data.repeats, views)

    @functools.cached_property
    def cache(self) -> TeacherCache | None:
        """The cached outputs of the teacher, if `config.teacher.cache` names a folder."""
        config = self.config
        if not config.teacher.cache or self.distiller.teacher is None:
            return None
        assert isinstance(self.train, data.Split)  # detectors have none, see `validation`
        return TeacherCache(
            self.distiller,
            self.train,
            Path(config.teacher.cache).expanduser(),
            config.teacher.cache_views,
            config.batch_size // config.accumulate,
            self.crop_size,
            tuple(config.crop_scale),
        )

    def create_loader(self) -> DeviceLoader | HostLoader | CachedLoader | DetectionLoader:
        """The training batches, after what the teacher's cache lacks has been written."""
        config, cores = self.config, os.cpu_count() or 1
        workers = min(config.data.workers, cores)
        if workers < config.data.workers:
            say(f"data.workers={config.data.workers} is reduced to the {cores} cores here.")
        if isinstance(self.train, DetectionSplit):
            flip, sizes = config.augment.flip, self._target_sizes
            return DetectionLoader(self.train, self.mesh, self.order, *sizes, flip, workers)
        loader = create_loader(
            self.train, self.mesh, self.order, tuple(config.crop_scale), workers, self.crop_size
        )
        if self.cache is None:
            return loader
        self.cache.fill()
        return self.cache.loader(loader, self.order)

    @property
    def _target_sizes(self) -> tuple[int, int]:
        """The number of objects of an image, and the side of their masks; 0: no masks."""
        masks = self.distiller.student.module.mask
        return self.config.data.max_objects, MASK_SIZE if masks else 0

    @property
    def crop_size(self) -> int:
        """Side of the training images before augmentation, in pixels.

        Encoded images are cropped at the teacher's size, if that is larger than the student's, so
        that the teacher sees all the detail that its input can hold.
        """
        teacher, side = self.distiller.teacher, self.train.images.shape[1]
        if teacher is None or not isinstance(self.train.images, EncodedImages):
            return side
        return max(side, teacher.image_size)

    def batch_shapes(self) -> dict[str, Any]:
        """The loader's batches, as shapes with their shardings."""
        count, fixed = self.config.batch_size, self.order.views > 0
        if isinstance(self.train, DetectionSplit):
            return detection_batch_shapes(self.train, self.mesh, count, *self._target_sizes)
        shapes: dict[str, Any] = batch_shapes(self.train, self.mesh, count, self.crop_size, fixed)
        if self.cache is not None:
            shapes[CACHED] = self.cache.row_shapes(count)
        return sharding.shaped(shapes, sharding.over_batch(self.mesh))

    def teacher_shapes(self) -> Any:
        """What a step needs of the teacher, as shapes with their shardings."""
        if self.cache is not None:
            return sharding.shaped(self.cache.plan.constants, sharding.replicated(self.mesh))
        shapes = self.distiller.teacher.shapes if self.distiller.teacher else {}
        return sharding.shaped(shapes, self.distiller.shardings.teacher)

    def teacher_arrays(self) -> Any:
        """What a step needs of the teacher, on the mesh; without the weights if it is cached."""
        return self.cache.constants if self.cache else self.distiller.teacher_variables
