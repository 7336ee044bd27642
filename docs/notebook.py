# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From a Transformer to a CNN, in a notebook
#
# This page is a script and a notebook: `python docs/notebook.py` runs it, and
# `jupytext --to notebook docs/notebook.py` (`pip install jupytext`) makes an `.ipynb` of it. It
# needs `pip install 'xkd_jax[export]'` and downloads nothing.

# %%
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import onnxruntime
import optax
from flax.training.train_state import TrainState

import xkd_jax as xkd

# %% [markdown]
# ## Images and teacher
#
# Images are arrays: uint8 or float in [0, 1], `[N, H, W, 3]`, of any size; labels are integers.
# Here they come with the package. Yours can be any arrays, and
# `xkd.data.load("folder:photos", "train", size=224)` makes them from a folder of photos.

# %%
train, test = (
    xkd.data.load("fashion_mnist_mini", split) for split in ("train[:1000]", "test[:2000]")
)
images, labels = train.images, train.labels
print(images.shape, images.dtype, train.class_names)

# %% [markdown]
# The teacher is a ViT that comes with the package. `xkd.load("timm:NAME")` downloads and converts
# timm's weights instead, which needs `pip install 'xkd_jax[hub]'`. A method that reads the
# teacher's logits, such as `logits`, needs a teacher with the classes of the images;
# [photos_to_onnx.md](photos_to_onnx.md) fits a classifier to one with others. A model is a function
# of images, which it resizes and normalises itself.

# %%
teacher = xkd.load("packaged:quickstart_teacher")
# teacher = xkd.load("timm:vit_small_patch16_224")


def accuracy(model):
    return float(np.mean(np.argmax(model(test.images), axis=-1) == test.labels))


print(f"teacher: {teacher.name}, top-1 {accuracy(teacher):.1%}")

# %% [markdown]
# ## Ten lines to a better student
#
# The same small ResNet, the same 1,000 images and the same seed: first with cross-entropy alone,
# then with the teacher's logits. Any optax optimizer will do, and any method by its name.

# %%
STEPS, BATCH = 200, 64
SMALL = {"layers": (1, 1, 1, 1), "width": 0.125, "stem": "cifar"}  # a ResNet-18, made smaller


def distil(method):
    student = xkd.create_model("resnet18", num_classes=10, image_size=28, **SMALL)
    optimizer = optax.sgd(optax.cosine_decay_schedule(0.1, STEPS), momentum=0.9)
    distiller = xkd.Distiller(teacher, student, method, optimizer)
    state = distiller.init(jax.random.key(0), images)
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        rows = rng.integers(len(images), size=BATCH)
        state, _ = distiller.step(state, images[rows], labels[rows])
    return distiller.student_model(state)


alone, student = distil("none"), distil("logits")
print(f"cross-entropy alone: {accuracy(alone):.1%}")
print(f"logits: {accuracy(student):.1%}")

# %% [markdown]
# One run with one seed is not a result: `xkd-jax sweep` trains several and reports the differences
# ([tables.md](tables.md)).
#
# ## In your own training loop
#
# A method is a dataclass with pure functions, so that it fits into any Flax and optax code. `init`
# makes the parameters that the method trains in addition to the student, and `loss` is the term
# that it adds to yours. This is `cakd`, the method of the paper, in a plain Flax training loop
# without `Distiller`. To keep it short, the weight of its adversary is 0, so that the discriminator
# isn't trained; `xkd_jax/distiller.py` has the whole step.

# %%
options = {"adversarial_weight": 0.0, "attention_weight": 10.0, "token_weight": 0.5}
method = xkd.methods.create_method("cakd", {"cakd": options})
model = xkd.create_model("resnet18", num_classes=10, image_size=28, **SMALL)
variables, zeros = model.init(jax.random.key(1)), (teacher.zero_outputs(), model.zero_outputs())
params, method_state = method.init(jax.random.key(2), *zeros, labels)
adversary = method.init_adversary(jax.random.key(3), *zeros)
run = TrainState.create(
    apply_fn=model.module.apply,
    params={"student": variables["params"], "method": params},
    tx=optax.sgd(optax.cosine_decay_schedule(0.05, STEPS), momentum=0.9),
)


def outputs(model, variables, images):
    """A model's intermediate outputs for images in [0, 1], with the side of its input."""
    _, out = model.forward(variables, model.preprocess(images))
    return out | {"side": model.image_size}


@jax.jit
def train_step(run, batch_stats, method_state, teacher_variables, images, labels, key):
    images = images / 255.0
    teacher_out = outputs(teacher, teacher_variables, images)
    batch = {"label": labels, "index": jnp.zeros_like(labels), "target": jax.nn.one_hot(labels, 10)}

    def loss_fn(params):
        (logits, student_out), updates = run.apply_fn(
            {"params": params["student"], "batch_stats": batch_stats},
            model.preprocess(images),
            train=True,
            mutable=["batch_stats"],
        )
        student_out = student_out | {"side": model.image_size}
        epoch = run.step * BATCH / len(train)
        term = method.loss(
            params["method"], method_state, teacher_out, student_out, batch, key, epoch, adversary
        )
        label_loss = optax.softmax_cross_entropy(logits, batch["target"]).mean()
        return method.label_weight * label_loss + term.value, (updates["batch_stats"], term.state)

    grads, (new_stats, new_state) = jax.grad(loss_fn, has_aux=True)(run.params)
    return run.apply_gradients(grads=grads), new_stats, new_state


batch_stats, rng = variables["batch_stats"], np.random.default_rng(0)
for step in range(STEPS):
    rows, key = rng.integers(len(images), size=BATCH), jax.random.key(step)
    run, batch_stats, method_state = train_step(
        run, batch_stats, method_state, teacher.variables, images[rows], labels[rows], key
    )
variables = {"params": run.params["student"], "batch_stats": batch_stats}
print(f"cakd by hand: {accuracy(dataclasses.replace(model, variables=variables)):.1%}")

# %% [markdown]
# ## What the student has learnt of the teacher's features
#
# `cakd` projects the student's features into the teacher's token space (the paper's GL projector).
# Both networks' tokens, as colours: the first three principal components of the teacher's tokens
# are red, green and blue, and the student's projected tokens are shown in the same components.

# %%
shown = jnp.asarray(test.images[:8], jnp.float32) / 255
teacher_out = outputs(teacher, teacher.variables, shown)
student_out = outputs(model, variables, shown)
features = method.project(run.params["method"], teacher_out, student_out)
tokens = np.concatenate(features.teacher_tokens)
mean = tokens.mean(0)
_, _, directions = np.linalg.svd(tokens - mean, full_matrices=False)
low, high = np.percentile((tokens - mean) @ directions[:3].T, (2, 98), axis=0)


def to_rgb(tokens):
    """[N, T, D] -> [N, h, w, 3] in [0, 1]."""
    colours = ((np.asarray(tokens) - mean) @ directions[:3].T - low) / (high - low)
    return np.clip(colours, 0, 1).reshape(len(tokens), *teacher_out["grid"], 3)


pictures = {
    "image": shown,
    "teacher": to_rgb(features.teacher_tokens),
    "student": to_rgb(features.student_tokens),
}
figure, axes = plt.subplots(len(pictures), len(shown), figsize=(8, 3), layout="constrained")
for line, (name, row) in zip(axes, pictures.items(), strict=True):
    line[0].set_ylabel(name)
    for ax, picture in zip(line, row, strict=True):
        ax.imshow(picture)
        ax.set(xticks=[], yticks=[])
figure.savefig("features.png")

# %% [markdown]
# ## Out of JAX
#
# A file for `xkd.load`, and an ONNX file that takes uint8 images `[N, 3, H, W]`.

# %%
student.save("student.safetensors")
uint8 = xkd.export.Options(uint8=True)
onnx_file, _ = xkd.export.export(student, "onnx", Path("exported"), uint8)
session = onnxruntime.InferenceSession(onnx_file)
(logits,) = session.run(None, {"images": test.images[:100].transpose(0, 3, 1, 2)})
difference = float(np.abs(logits - student(test.images[:100])).max())
print(f"{onnx_file}: largest difference of a logit {difference:.1e}")
