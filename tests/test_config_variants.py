"""Recipes and their variants, such as the paper's tables: built and checked, never trained."""

import functools
import runpy

import jax
import jax.numpy as jnp
import pytest

from xkd_jax.analysis.flops import count_flops
from xkd_jax.cli import recipes
from xkd_jax.config import default_config
from xkd_jax.configs import (
    cifar100,
    cifar100_published,
    common,
    imagenet,
    imagenet_release,
    speed,
    spoof,
)
from xkd_jax.errors import UserError
from xkd_jax.methods import check_pair, create_method
from xkd_jax.methods.base import apply
from xkd_jax.model import create_model
from xkd_jax.validation import validate

PATHS = [recipes.FOLDER / f"{name}.py" for name in recipes.names()]
ROWS = [
    *((cifar100, variant) for variant in common.TABLE_1),
    *((imagenet, variant) for variant in dict.fromkeys(common.TABLE_2 + common.TABLE_3)),
    *((spoof, variant) for variant in common.TABLE_4),
]
IDS = [f"{recipe.__name__.rsplit('.', 1)[-1]}:{variant}" for recipe, variant in ROWS]


@functools.cache
def outputs(model, size):
    return create_model(model, num_classes=10, image_size=size).output_shapes


@pytest.mark.parametrize(("recipe", "variant"), ROWS, ids=IDS)
def test_every_row_of_the_tables_is_a_valid_config(recipe, variant):
    config = recipe.get_config(variant)
    validate(config)
    teacher, student = variant.split("-")
    assert (config.student.model, config.image_size) == common.STUDENTS[student]
    assert config.teacher.model == common.TEACHERS[teacher][0]
    assert config.teacher.weights
    widened = config.teacher.model.startswith("resnet")
    assert config.method.name == ("logits" if widened else "cakd")
    assert config.epochs == recipe.get_config().epochs


# tests/cli/test_tables.py checks the same pairs with every method in CI.
@pytest.mark.exhaustive
@pytest.mark.parametrize(("recipe", "variant"), ROWS, ids=IDS)
def test_every_pair_of_the_tables_is_supported(recipe, variant):
    config = recipe.get_config(variant)
    teacher = outputs(*common.TEACHERS[variant.split("-")[0]])
    student = outputs(config.student.model, config.image_size)
    method = create_method(config.method.name, config.method)
    check_pair(method, teacher, student)
    if config.method.name == "cakd":
        # A place of the same stride where the teacher's images are at least as large.
        tap = {"vit": "tokens", "swin": "stage4"}.get(config.student.model.split("_")[0])
        tap = tap or ("stage4" if "swin" in config.teacher.model else "stage3")
        if config.image_size <= teacher["side"]:
            assert f"tapped at {tap}, " in method.describe(teacher, student)


# The FLOPs printed in the paper's tables, multiply-adds in billions. Inception-v3 and ResNeXt-26
# are printed without.
PRINTED = {
    "resnet18": 1.9, "resnet50": 4.1, "resnet50x2": 15.9, "resnet152": 11.0, "xceptionx2": 57.3,
    "mobilenetv2": 0.3, "efficientnet_b0": 1.6, "vit_b16": 55.4, "vit_b32": 13.8, "vit_l16": 190.7,
    "deit_b": 55.4, "swin_b": 15.4, "swin_l": 103.9, "resnet152x2": 212.0, "resnet101x3": 205.0,
}  # fmt: skip


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", PRINTED)
def test_the_image_sizes_are_those_of_the_printed_flops(name):
    sized = {table[name] for table in (common.STUDENTS, common.TEACHERS) if name in table}
    for network, size in sized:
        model = create_model(network, num_classes=1000, image_size=size)

        def forward(variables, images, model=model):
            return apply(model.module, variables, images, train=False)[0]

        images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        flops = count_flops(forward, model.shapes, images)
        # Ours are exact, but another common size differs by a quarter or more.
        assert flops == pytest.approx(1e9 * PRINTED[name], rel=0.08)


def test_the_tables_have_all_their_rows():
    assert [len(set(table)) for table in (common.TABLE_1, common.TABLE_2, common.TABLE_3)] == [
        16, 16, 20,
    ]  # fmt: skip
    with pytest.raises(UserError, match="did you mean vit_l16-resnet50"):
        cifar100.get_config("vit_l16-resnet51")


def test_the_release_is_the_released_script():
    config = imagenet_release.get_config()
    validate(config)
    assert (config.epochs, config.batch_size, config.optimizer.learning_rate) == (120, 256, 0.1)
    assert (config.schedule.name, config.schedule.factor) == ("step", 0.1)
    warmup = config.schedule.warmup_epochs
    assert [boundary - warmup for boundary in config.schedule.boundaries] == [30, 60, 90]
    assert (config.optimizer.name, config.optimizer.weight_decay, warmup) == ("sgd", 2e-5, 5)
    assert config.optimizer.clip_norm == 0
    assert (config.augment.auto, config.augment.erasing) == ("trivialaugment", 0.1)
    assert (config.augment.mixup, config.augment.cutmix, config.label_smoothing) == (0.2, 0, 0.1)
    assert (config.data.repeats, config.crop_pct) == (4, 1.0)
    assert config.student.model == "resnet50"
    assert create_method("cakd_release", config.method) == create_method("cakd_release", {})


@pytest.mark.parametrize("variant", speed.PAIRS)
def test_the_pairs_that_are_timed_have_whole_networks(variant):
    config = speed.get_config(variant)
    assert config.student.model == speed.PAIRS[variant][1]
    assert not config.student.args
    assert not config.teacher.args


@pytest.mark.parametrize("variant", cifar100_published.COMBINED)
def test_crd_with_logits_has_the_published_weights(variant):
    config = cifar100_published.get_config(variant)
    validate(config)
    assert config.student.model == variant.split("-")[0]
    method = create_method(config.compare[1], config.method)
    assert method.label_weight == 1
    assert {name: part.weight for name, part in method.parts} == {"crd": 0.8, "logits": 1.0}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_recipes_are_valid(path):
    recipe = runpy.run_path(str(path))
    validate(recipe["get_config"]())
    name = path.relative_to(recipes.FOLDER).as_posix()
    assert f"--config configs/{name}" in " ".join(recipe["__doc__"].split())
    validate(recipe["get_config"]("smoke"))
    with pytest.raises(UserError, match="unknown variant 'smoek'; did you mean smoke"):
        recipe["get_config"]("smoek")


def test_default_config_is_locked():
    with pytest.raises(AttributeError, match="epoch"):
        default_config().epoch = 3
