"""The fixed square that images of any size are resized and padded to, for detectors."""

import dataclasses
import math

import numpy as np

from xkd_jax.errors import UserError

MULTIPLE = (
    32  # stride of a backbone's last stage: every stage's grid then covers the square exactly
)


@dataclasses.dataclass(frozen=True)
class Frame:
    """A square in whose top left corner a resized image lies; the rest is padding.

    Attributes:
      min_size: of the resized image's shorter side, in pixels.
      max_size: largest length of its longer side, in pixels, which takes precedence.
    """

    min_size: int = 800
    max_size: int = 1333

    def __post_init__(self):
        """Checks the sizes.

        Raises:
          UserError: they are not positive, or in the wrong order.
        """
        if not 0 < self.min_size <= self.max_size:
            raise UserError(
                f"images can't be resized to min_size={self.min_size} and max_size={self.max_size} "
                f"pixels; both must be positive and max_size not the smaller one."
            )

    @property
    def side(self) -> int:
        """Side of the square, in pixels: `max_size` rounded up to a multiple of `MULTIPLE`."""
        return -(-self.max_size // MULTIPLE) * MULTIPLE

    def fit(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of a resized image, as torchvision's GeneralizedRCNNTransform has them.

        Args:
          height: of the image, in pixels.
          width: of the image, in pixels.
        """
        scale = min(self.min_size / min(height, width), self.max_size / max(height, width))
        return max(1, math.floor(height * scale)), max(1, math.floor(width * scale))

    def pad(self, pixels: np.ndarray, colour: np.ndarray) -> np.ndarray:
        """Pads a resized image at the right and at the bottom.

        Args:
          pixels: uint8 [h, w, 3].
          colour: of the padding, uint8 [3].

        Returns:
          uint8 [side, side, 3].
        """
        padded = np.empty((self.side, self.side, 3), np.uint8)
        height, width = pixels.shape[:2]
        padded[:height, :width] = pixels
        padded[:height, width:] = colour
        padded[height:] = colour
        return padded
