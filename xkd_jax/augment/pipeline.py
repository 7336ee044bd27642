"""From a batch as it is stored to what each network sees of it."""

import dataclasses

import jax
import optax

from xkd_jax.augment import ops
from xkd_jax.augment.mixup import mix
from xkd_jax.augment.multiview import MultiView, multi_view
from xkd_jax.augment.policies import Augment, augment


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The augmentation of a training step. By default only the multi-view generator is on.

    Crop padding, flip, `policy` and the multi-view generator's shared geometry apply to images of
    the size that they are given in; the rest applies at the student's size.

    Attributes:
      crop_padding: pixels of the student's view that are added on each side before a random crop
        back to the old size; 0: off.
      flip: whether half of the images are mirrored.
      policy: the strong augmentation, mixup and CutMix.
      views: strengths of the multi-view generator, for methods that use it.
      label_smoothing: in [0, 1).
      student_size: side of the student's view in pixels, where images are cut larger for the
        teacher; 0: both views keep the size of the images.
    """

    crop_padding: int = 0
    flip: bool = False
    policy: Augment = dataclasses.field(default_factory=Augment)
    views: MultiView = dataclasses.field(default_factory=MultiView)
    label_smoothing: float = 0.0
    student_size: int = 0

    def __call__(
        self, key: jax.Array, images: jax.Array, targets: jax.Array, multiple: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Augments one batch.

        Args:
          key: a typed key.
          images: [N, H, W, 3], uint8 or float in [0, 1].
          targets: class probabilities [N, K].
          multiple: whether the multi-view generator makes the student's view.

        Returns:
          The teacher's and the student's view, float32 in [0, 1], and the targets.
        """
        crop_key, view_key = jax.random.split(key)
        augment_key, mix_key = jax.random.split(jax.random.fold_in(key, 1))
        padding = self.padding(images.shape[1])
        images = ops.random_crop_flip(crop_key, ops.to_float(images), padding, self.flip)
        images = augment(augment_key, images, self.policy)
        targets = optax.smooth_labels(targets, self.label_smoothing)
        images, targets = mix(mix_key, images, targets, self.policy.mixup, self.policy.cutmix)
        if multiple:
            return *multi_view(view_key, images, self.views, self.student_size), targets
        student = ops.resize(images, self.student_size) if self.student_size else images
        return images, student, targets

    def padding(self, side: int) -> int:
        """`crop_padding` in pixels of images with this side."""
        return round(self.crop_padding * side / (self.student_size or side))
