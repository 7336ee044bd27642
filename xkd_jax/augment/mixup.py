"""Mixup and CutMix: mixes pairs of images and their targets."""

import jax
import jax.numpy as jnp


def mix(
    key: jax.Array,
    images: jax.Array,
    targets: jax.Array,
    mixup_alpha: float,
    cutmix_alpha: float,
) -> tuple[jax.Array, jax.Array]:
    """Mixup (Zhang et al., 2018) or CutMix (Yun et al., 2019), one draw for the whole batch.

    Each image is mixed with its counterpart in the reversed batch, as in timm (Ross Wightman,
    Apache-2.0). If both alphas are above 0, each method is chosen with probability 0.5. The same
    key mixes another view of the same size identically.

    Args:
      key: a typed key.
      images: float32 [N, H, W, C].
      targets: float32 [N, K], probabilities, after any label smoothing.
      mixup_alpha: the image's weight is drawn from Beta(alpha, alpha); 0 turns mixup off.
      cutmix_alpha: the same for CutMix, whose weight is then set to the exact share of pixels that
        the pasted rectangle leaves.

    Returns:
      Mixed images and targets, of the same shapes.
    """
    if not (mixup_alpha or cutmix_alpha):
        return images, targets
    choice_key, share_key, place_key = jax.random.split(key, 3)
    h, w = images.shape[1:3]
    use_cutmix = (
        jax.random.bernoulli(choice_key) if mixup_alpha and cutmix_alpha else bool(cutmix_alpha)
    )
    # A Beta draw is X / (X + Y) of two gamma draws; one draw serves whichever method is chosen.
    gammas = jax.random.loggamma(share_key, jnp.where(use_cutmix, cutmix_alpha, mixup_alpha), (2,))
    share = jax.nn.sigmoid(gammas[0] - gammas[1])
    kept = 1 - _rectangle(place_key, share, h, w)
    own = jnp.where(use_cutmix, kept, share)[..., None]
    share = jnp.where(use_cutmix, kept.sum() / (h * w), share)
    mixed = own * images + (1 - own) * images[::-1]
    return mixed, share * targets + (1 - share) * targets[::-1]


def _rectangle(key: jax.Array, share: jax.Array, h: int, w: int) -> jax.Array:
    """1 inside a rectangle that covers 1 - share of the image, clipped at the border: [H, W]."""
    side = jnp.sqrt(1 - share)
    draws = jax.random.uniform(key, (2,))

    def covered(size: int, draw: jax.Array) -> jax.Array:
        length = jnp.floor(size * side)
        start = jnp.floor(size * draw) - jnp.floor(length / 2)
        position = jnp.arange(size)
        return (position >= start) & (position < start + length)

    return (covered(h, draws[0])[:, None] & covered(w, draws[1])).astype(jnp.float32)
