"""The paper's equations in NumPy, float64; random outputs and parameters to try them on."""

import math

import jax
import jax.numpy as jnp
import numpy as np

HEADS, HEAD_DIM = 2, 3
WIDTH = HEADS * HEAD_DIM


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def qkv(seed, n=2, tokens=6):
    return tuple(normal(n, HEADS, tokens, HEAD_DIM, seed=seed + i) for i in range(3))


def random_like(tree, seed=0):
    """Random values in place of a tree of arrays or shapes; variances and scales are 1."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        if path[-1].key in ("scale", "var"):
            return jnp.ones(leaf.shape)
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 1
        return jnp.asarray((rng.normal(size=leaf.shape) * fan_in**-0.5).astype(np.float32))

    return jax.tree_util.tree_map_with_path(fill, tree)


def random_params(module, *args, **kwargs):
    return random_like(jax.eval_shape(lambda key: module.init(key, *args, **kwargs), key(0)))


def key(seed):
    return jax.random.key(seed)


def outputs(grid=(4, 5), channels=4):
    """A teacher of three blocks and a student whose `stage2` has the teacher's grid."""
    tokens = grid[0] * grid[1]
    teacher: dict = {"grid": grid, "tokens": normal(2, tokens, WIDTH, seed=1)}
    for i in (1, 2, 3):
        teacher[f"block{i:02d}"] = normal(2, tokens, WIDTH, seed=10 * i)
        for name, x in zip(("query", "key", "value"), qkv(10 * i + 1, 2, tokens), strict=True):
            teacher[name] = teacher[f"block{i:02d}_{name}"] = x
    student = {
        f"stage{i}": normal(2, grid[0] * 4 // 2**i, grid[1] * 4 // 2**i, channels, seed=i)
        for i in (1, 2, 3)
    }
    return teacher, student


def method_params(method, teacher, student):
    shapes = jax.eval_shape(lambda k: method.init(k, teacher, student)[0], key(0))
    adversary = jax.eval_shape(lambda k: method.init_adversary(k, teacher, student), key(0))
    return random_like(shapes), random_like(adversary, seed=1)


def full_loss(method, teacher, student, seed=0):
    params, adversary = method_params(method, teacher, student)
    return method.loss(params, {}, teacher, student, {}, key(seed), jnp.zeros(()), adversary)


def run_loss(method, teacher, student, seed=0):
    loss, state, metrics, _ = full_loss(method, teacher, student, seed)
    assert state == {}
    return loss, metrics


def np_softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def np_attention(query, keys, value):
    query, keys, value = (np.asarray(x, np.float64) for x in (query, keys, value))
    out = np.zeros_like(value)
    for n, h, i in np.ndindex(query.shape[:3]):
        scores = np.array([query[n, h, i] @ k for k in keys[n, h]]) / math.sqrt(query.shape[-1])
        out[n, h, i] = np_softmax(scores) @ value[n, h]
    return out


def np_relation(value):
    n, heads, tokens, d = value.shape
    out = np.zeros((n, heads, tokens, tokens))
    for i, j, k in np.ndindex(n, heads, tokens):
        for m in range(tokens):
            out[i, j, k, m] = np.dot(value[i, j, k], np.float64(value[i, j, m])) / math.sqrt(d)
    return out


def np_conv3x3(x, kernel):
    """Stride 1, zeros around the map."""
    n, h, w, _ = x.shape
    out = np.zeros((n, h, w, kernel.shape[-1]))
    for i, row, column, down, right in np.ndindex(n, h, w, 3, 3):
        y, z = row + down - 1, column + right - 1
        if 0 <= y < h and 0 <= z < w:
            out[i, row, column] += np.float64(x[i, y, z]) @ np.float64(kernel[down, right])
    return out


def np_heads(x):
    """[N, h, w, D] -> [N, H, T, d]: heads are contiguous slices of the channels."""
    n, h, w, _ = x.shape
    out = np.zeros((n, HEADS, h * w, HEAD_DIM))
    for i, head, row, column in np.ndindex(n, HEADS, h, w):
        channels = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        out[i, head, row * w + column] = x[i, row, column, channels]
    return out


def np_proj_1(params, features):
    params = {name: np.asarray(p) for name, p in params["params"].items()}
    return tuple(
        np_heads(np_conv3x3(features, params[f"{m}_kernel"]) + params[f"{m}_bias"])
        for m in ("query", "key", "value")
    )


def np_proj_2(params, features):
    kernel, bias = (np.asarray(params["params"][p], np.float64) for p in ("kernel", "bias"))
    n, h, w, _ = features.shape
    out = np.zeros((n, h * w, kernel.shape[-1]))
    for i, row, column in np.ndindex(n, h, w):
        group = (row // 4) * math.ceil(w / 4) + column // 4
        out[i, row * w + column] = features[i, row, column] @ kernel[group] + bias[group]
    return out


def np_discriminator(params, tokens):
    x = np.asarray(tokens, np.float64)
    for layer in range(3):
        dense = params["params"][f"Dense_{layer}"]
        x = x @ np.asarray(dense["kernel"], np.float64) + np.asarray(dense["bias"], np.float64)
        if layer < 2:
            x = np.where(x > 0, x, 0.2 * x)
    return x[..., 0].mean(1)


def np_sigmoid(x):
    return 1 / (1 + np.exp(-np.float64(x)))
