"""Random network outputs for tests of methods, with the keys of real networks."""

import jax
import jax.numpy as jnp
import numpy as np


def _draw(seed, shapes):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=s).astype(np.float32)) for k, s in shapes.items()}


def cnn(seed, n=4, sides=(8, 4, 2, 1), widths=(3, 4, 5, 6), classes=5):
    """Four stages after a ReLU and before it."""
    shapes = {
        f"stage{i}_pre": (n, s, s, w)
        for i, (s, w) in enumerate(zip(sides, widths, strict=True), start=1)
    }
    out = _draw(seed, shapes | {"pooled": (n, widths[-1]), "logits": (n, classes)})
    return out | {k.removesuffix("_pre"): jax.nn.relu(out[k]) for k in shapes}


def vit(seed, n=4, side=4, width=8, depth=3, heads=2, classes=5, distilled=False):
    """Patch tokens on a square grid, a class token and, if `distilled`, a distillation token."""
    t, head = side * side, (n, heads, side * side, width // heads)
    shapes = {"tokens": (n, t, width), "cls": (n, width), "pooled": (n, width)}
    prefix = (n, heads, 1 + distilled, width // heads)
    shapes |= {f"prefix_{name}": prefix for name in ("query", "key", "value")}
    shapes |= {f"block{i:02d}": (n, t, width) for i in range(1, depth + 1)}
    for name in ("query", "key", "value"):
        shapes |= {f"block{i:02d}_{name}": head for i in range(1, depth + 1)}
    if distilled:
        shapes |= {"dist": (n, width), "cls_logits": (n, classes), "dist_logits": (n, classes)}
    out = _draw(seed, shapes | {"logits": (n, classes)})
    if distilled:
        out["logits"] = (out["cls_logits"] + out["dist_logits"]) / 2
    last = {name: out[f"block{depth:02d}_{name}"] for name in ("query", "key", "value")}
    return out | last | {"grid": (side, side)}


def swin(seed, n=4, sides=(8, 4, 2, 1), widths=(4, 8, 16, 32), heads=2, classes=5):
    """One block in each of four stages."""
    shapes = {"tokens": (n, sides[-1] ** 2, widths[-1])}
    for i, (side, width) in enumerate(zip(sides, widths, strict=True), start=1):
        shapes[f"block{i:02d}"] = (n, side * side, width)
        for name in ("query", "key", "value"):
            shapes[f"block{i:02d}_{name}"] = (n, heads, side * side, width // heads)
    out = _draw(seed, shapes | {"pooled": (n, widths[-1]), "logits": (n, classes)})
    for i, side in enumerate(sides, start=1):
        out[f"stage{i}"] = out[f"block{i:02d}"].reshape(n, side, side, -1)
    bias = _draw(seed + 1, {"block04_bias": (1, heads, sides[-1] ** 2, sides[-1] ** 2)})
    last = {name: out[f"block04_{name}"] for name in ("query", "key", "value")}
    last |= bias | {"bias": bias["block04_bias"]}
    return out | last | {"grid": (sides[-1], sides[-1])}


def teacher_cnn(seed, **options):
    """A CNN with a stem in front of three levels, and other grids and widths than `cnn`."""
    return cnn(seed, sides=(8, 8, 4, 2), widths=(4, 6, 7, 8), **options)


# Teacher and student; no two have all of their widths, grids and numbers of levels in common.
PAIRS = {
    "CNN to CNN": (teacher_cnn, cnn),
    "ViT to CNN": (vit, cnn),
    "Swin to CNN": (swin, cnn),
    "Swin to ViT": (swin, vit),
    "CNN to ViT": (cnn, vit),
}


def pair(name):
    """Outputs of the teacher and of the student of one of PAIRS."""
    teacher, student = PAIRS[name]
    return teacher(0), student(1)


def init(method, teacher, student):
    """The method's `init` on these outputs, compiled as a whole, which is faster."""
    return jax.jit(lambda key: method.init(key, teacher, student))(jax.random.key(0))


def gradient_fn(method, teacher, student, state=None):
    """The method's loss for a state, compiled once for outputs of these shapes.

    Returns:
      A function of the parameters, the two outputs and the progress (default 0). It returns the
      loss and its gradients: of the parameters, the teacher's outputs and the student's.
    """
    grids = [{k: v for k, v in out.items() if k == "grid"} for out in (teacher, student)]
    n = len(student["logits"])
    batch = {"label": jnp.arange(n) % student["logits"].shape[-1], "index": jnp.arange(n)}

    @jax.jit
    def run(params, teacher, student, progress):
        def loss_fn(params, teacher, student):
            outs = teacher | grids[0], student | grids[1]
            return method.loss(params, state or {}, *outs, batch, jax.random.key(0), progress).value

        return jax.value_and_grad(loss_fn, (0, 1, 2))(params, teacher, student)

    def call(params, teacher, student, progress=0.0):
        outs = ({k: v for k, v in out.items() if k != "grid"} for out in (teacher, student))
        return run(params, *outs, progress)

    return call


def reached(gradients):
    """The names of the outputs with a nonzero gradient."""
    return {name for name, gradient in gradients.items() if np.any(np.asarray(gradient) != 0)}


def learn(method, name, progress=0.0):
    """A method's first step on one of PAIRS.

    Returns:
      Its parameters, its `gradient_fn`, the loss and the gradients.
    """
    outs = pair(name)
    method.check(*outs)
    params, state = init(method, *outs)
    gradient = gradient_fn(method, *outs, state)
    return params, gradient, *gradient(params, *outs, progress)


def step_down(params, gradients, loss):
    """One gradient descent step, sized to reduce the loss by 1% to first order."""
    rate = 1e-2 * loss / sum(np.sum(leaf**2) for leaf in jax.tree.leaves(gradients))
    return jax.tree.map(lambda p, g: p - rate * g, params, gradients)


def assert_levels_learn(name, levels, gradients):
    """Checks that all parameters and the student's `levels` (a CNN's before the activation) learn.

    The teacher gets no gradient. `gradients` are those of `learn` on PAIRS[name].
    """
    of_params, of_teacher, of_student = gradients
    assert reached(of_teacher) == set()
    suffix = "" if name.endswith("ViT") else "_pre"
    assert reached(of_student) == {level + suffix for level in levels}
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(of_params))
