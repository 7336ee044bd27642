"""What the tests of the networks share."""

import jax
import jax.numpy as jnp
import numpy as np

from xkd_jax.models import create_model

TINY_VIT = {"embed_dim": 16, "depth": 2, "num_heads": 2}
TINY_REGNET = {"depth": 4, "w0": 8, "wa": 7.0, "wm": 1.6}  # widths 8, 16, 24 and 32


def tiny_vit(**args):
    return create_model("vit_tiny_patch4_32", num_classes=5, **{**TINY_VIT, **args})


def tiny_resnet(name="resnet18", **args):
    args = {"width": 0.125, "stem": "cifar", "layers": (1, 1, 1, 1), **args}
    return create_model(name, num_classes=5, **args)


def images(n=2, size=32):
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(n, size, size, 3)).astype(np.float32))


def init(model, size=32):
    """Random variables without compiling `model.init`, most of these tests' time."""
    rng = np.random.default_rng(0)
    tree = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))

    def fill(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        if path[-1].key in ("scale", "var", "gamma", "gamma_1", "gamma_2"):
            return jnp.ones(leaf.shape)
        return jnp.asarray(noise * np.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim > 1 else 0 * noise)

    return jax.tree_util.tree_map_with_path(fill, tree)


def shapes(model, x, train=False):
    """The shapes of `out`, without computing anything."""

    def run(key):
        variables = model.init(key, x)
        return model.apply(variables, x, train=train, mutable=["batch_stats"])[0][1]

    return {
        key: tuple(leaf) if key == "grid" else leaf.shape
        for key, leaf in jax.eval_shape(run, jax.random.key(0)).items()
    }


def count_parameters(model):
    """The number of trained parameters."""
    size = getattr(model, "img_size", 32)
    x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def shapes_at_32(*channels, pooled):
    """The shapes of what a CNN for 32 pixels shows of two images, with 7 classes."""
    expected: dict[str, tuple[int, ...]] = {"pooled": (2, pooled), "logits": (2, 7)}
    for stage, (side, features) in enumerate(zip((32, 16, 8, 4), channels, strict=True), start=1):
        expected[f"stage{stage}"] = expected[f"stage{stage}_pre"] = (2, side, side, features)
    return expected


def initial(model, *names):
    """Some of `model.init`'s parameters; jit drops the work for the others."""

    def run(key):
        params = model.init(key, images())["params"]
        return [params[name] for name in names]

    return jax.jit(run)(jax.random.key(0))
