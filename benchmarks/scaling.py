"""Weak and strong scaling over TPU pods, as predicted by the TPU compiler; nothing is run.

python benchmarks/scaling.py [--topologies v5e:2x2 v5e:4x4 ...] [--pairs base ...]

Needs the extra `pods`, and minutes per row. Weak: a fixed number of images per chip. Strong: a
fixed batch size, whatever the number of chips.
"""

import argparse

from xkd_jax import backend
from xkd_jax.analysis import hlo, tpu_forecast
from xkd_jax.analysis.memory import GIB
from xkd_jax.analysis.tpu_forecast import experiment_of_shapes, predict_train_step
from xkd_jax.config import Config, default_config

PAIRS = {  # the paper's: teacher, student, image size
    "base": ("vit_base_patch16_224", "resnet50", 224),
    "base384": ("vit_base_patch16_384", "resnet50", 384),
    "large": ("vit_large_patch16_224", "resnet50", 224),
    "large384": ("vit_large_patch16_384", "resnet50", 384),
    "swin": ("swin_large_patch4_window7_224", "resnet50x2", 224),
    "swin384": ("swin_large_patch4_window12_384", "resnet50x2", 384),
}
TOPOLOGIES = ("v5e:2x2", "v5e:2x4", "v5e:4x4", "v5e:8x8", "v5e:16x16")
IMAGES = 16  # per chip, in weak scaling: on 16 chips that is the paper's batch of 256
BATCH = 1024  # in total, in strong scaling


def create_config(teacher: str, student: str, size: int, batch_size: int) -> Config:
    """configs/imagenet.py with another pair."""
    config = default_config()
    config.update(batch_size=batch_size, image_size=size)
    config.method.name = "cakd"
    config.student.model = student
    config.teacher.weights = f"timm:{teacher}"
    config.data.update(name="tfds:imagenet2012", eval="validation", test="validation")
    config.augment.crop_padding = 0
    config.optimizer.clip_norm = 2.0
    config.views.mask_patch = 16
    return config


def row(pair: str, topology: str, strong: bool, teacher: str) -> str:
    """One line of the table; `teacher` is `config.mesh.teacher`."""
    mesh, chip = tpu_forecast.topology(topology)
    batch_size = BATCH if strong else IMAGES * mesh.size
    with backend.assume("tpu"):
        config = create_config(*PAIRS[pair], batch_size)
        config.mesh.teacher = teacher
        experiment = experiment_of_shapes(config, mesh)
        prediction = predict_train_step(experiment, chip)
    reduced, gathered = (
        hlo.total_bytes([c for c in prediction.collectives if c.kind in kinds]) / 2**20
        for kinds in (("all-reduce", "reduce-scatter"), ("all-gather",))
    )
    cells = (
        pair,
        teacher,
        "strong" if strong else "weak",
        topology,
        mesh.size,
        batch_size,
        f"{prediction.memory / GIB:.1f}",
        f"{1e3 * prediction.compute:.1f}",
        f"{1e3 * prediction.communication:.1f}",
        f"{batch_size / prediction.seconds:,.0f}",
        f"{100 * prediction.mfu(mesh.size, chip):.0f}",
        f"{reduced:.0f}",
        f"{gathered:.0f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=("base", "large"))
    parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES)
    parser.add_argument("--scaling", nargs="+", choices=("weak", "strong"), default=("weak",))
    parser.add_argument("--teacher", choices=("auto", "replicated", "fsdp"), default="auto")
    options = parser.parse_args()
    titles = (
        "pair", "teacher", "scaling", "topology", "chips", "batch", "GiB per chip", "compute, ms",
        "communication, ms", "images/s", "MFU, %", "reduced, MiB", "gathered, MiB",
    )  # fmt: skip
    print(f"| {' | '.join(titles)} |\n|{' --- |' * 4}{' ---: |' * (len(titles) - 4)}")
    for pair in options.pairs:
        for scaling in options.scaling:
            for topology in options.topologies:
                print(row(pair, topology, scaling == "strong", options.teacher), flush=True)


if __name__ == "__main__":
    main()
