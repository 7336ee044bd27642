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

    Attributes:
      crop_padding: pixels added on each side before a random crop back to the old size; 0: off.
      flip: whether half of the images are mirrored.
      policy: the strong augmentation, mixup and CutMix.
      views: strengths of the multi-view generator, for methods that use it.
      label_smoothing: in [0, 1).
    """

    crop_padding: int = 0
    flip: bool = False
    policy: Augment = dataclasses.field(default_factory=Augment)
    views: MultiView = dataclasses.field(default_factory=MultiView)
    label_smoothing: float = 0.0

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
        images = ops.random_crop_flip(crop_key, ops.to_float(images), self.crop_padding, self.flip)
        images = augment(augment_key, images, self.policy)
        targets = optax.smooth_labels(targets, self.label_smoothing)
        images, targets = mix(mix_key, images, targets, self.policy.mixup, self.policy.cutmix)
        if multiple:
            return *multi_view(view_key, images, self.views), targets
        return images, images, targets
