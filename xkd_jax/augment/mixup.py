"""Mixup and CutMix: pairs of images mixed, and their targets with them."""

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

    An image's partner is as far from the batch's end as it is from the start, as in timm (Ross
    Wightman, Apache-2.0). With both alphas above 0, each has its turn with probability 0.5. The
    same key mixes another view of the same size alike.

    Args:
      key: a typed key.
      images: float32 [N, H, W, C].
      targets: float32 [N, K], probabilities; smoothed already where they are to be.
      mixup_alpha: the image's share is drawn from Beta(alpha, alpha); 0 turns mixup off.
      cutmix_alpha: the same for CutMix, where the share is what the pasted rectangle leaves,
        exactly.

    Returns:
      Mixed images and targets, shaped like those given.
    """
    if not (mixup_alpha or cutmix_alpha):
        return images, targets
    turn_key, share_key, place_key = jax.random.split(key, 3)
    h, w = images.shape[1:3]
    turn = jax.random.bernoulli(turn_key) if mixup_alpha and cutmix_alpha else bool(cutmix_alpha)
    # A Beta draw is the share of one of two gamma draws; both methods share the one that they need.
    gammas = jax.random.loggamma(share_key, jnp.where(turn, cutmix_alpha, mixup_alpha), (2,))
    share = jax.nn.sigmoid(gammas[0] - gammas[1])
    kept = 1 - _rectangle(place_key, share, h, w)
    own = jnp.where(turn, kept, share)[..., None]
    share = jnp.where(turn, kept.sum() / (h * w), share)
    mixed = own * images + (1 - own) * images[::-1]
    return mixed, share * targets + (1 - share) * targets[::-1]


def _rectangle(key: jax.Array, share: jax.Array, h: int, w: int) -> jax.Array:
    """1 in a rectangle of 1 - share of the image about a random centre, cut at the border."""
    side = jnp.sqrt(1 - share)
    draws = jax.random.uniform(key, (2,))

    def covered(size: int, draw: jax.Array) -> jax.Array:
        length = jnp.floor(size * side)
        start = jnp.floor(size * draw) - jnp.floor(length / 2)
        position = jnp.arange(size)
        return (position >= start) & (position < start + length)

    return (covered(h, draws[0])[:, None] & covered(w, draws[1])).astype(jnp.float32)
