"""What a method reads of its teacher, found by tracing."""

import numpy as np
import pytest

from tests.experiments import tiny_config
from xkd_jax.errors import UserError
from xkd_jax.experiment import create_experiment
from xkd_jax.teacher.plan import plan

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY_CNN = {"layers": (1, 1, 1, 1), "width": 0.125, "stem": "cifar"}


def plan_of(method, change=None):
    config = tiny_config(method)
    if change:
        change(config)
    return plan(create_experiment(config).distiller)


def cnn(config):
    config.teacher.model = "resnet18"
    config.teacher.args = TINY_CNN


def swin(config):
    config.teacher.model = "swin_tiny_patch4_window7_224"
    config.teacher.args = {
        "img_size": 32, "patch_size": 2, "embed_dim": 8, "depths": (1, 1, 1, 1),
        "num_heads": (1, 1, 2, 2), "window_size": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("logits", {"logits"}),
        ("cakd", {"query", "key", "value", "tokens"}),
        ("cakd+logits", {"query", "key", "value", "tokens", "logits"}),
        ("crd", {"pooled"}),
        ("rkd", {"pooled"}),
        ("ofd", {"block01", "block02"}),
        ("ab", {"block01", "block02"}),
    ],
)
def test_of_a_vit(method, names):
    found = plan_of(method)
    assert set(found.rows) == names
    assert not found.constants
    assert {row.dtype for row in found.rows.values()} == {np.dtype(np.float16)}


def test_an_earlier_block_of_cakd():
    found = plan_of("cakd", lambda config: config.method.cakd.update(teacher_block=-2))
    assert set(found.rows) == {"block01", "block01_query", "block01_key", "block01_value"}


@pytest.mark.slow
def test_a_swins_attention_bias_is_stored_once():
    found = plan_of("cakd", swin)
    assert set(found.rows) == {"query", "key", "value", "tokens"}
    assert set(found.constants) == {"bias"}


def test_stages_whose_shape_alone_is_read_are_not_stored():
    assert set(plan_of("at", cnn).rows) == {"stage1", "stage2", "stage3", "stage4"}
    assert len(plan_of("fitnet", cnn).rows) == 1


def test_bytes_of_a_view():
    """8 x 8 tokens of 384 numbers, and query, key and value: 196,608 bytes with float16."""

    def vit_s14(config):
        config.teacher.args = {
            "img_size": 112, "patch_size": 14, "embed_dim": 384, "depth": 2, "num_heads": 6,
        }  # fmt: skip

    assert plan_of("cakd", vit_s14).bytes_per_view == 4 * 64 * 384 * 2


def test_statistics_of_the_batch_cannot_be_cached():
    with pytest.raises(UserError, match="set the method's teacher_batch_stats=False"):
        plan_of("ofd", cnn)

    def running(config):
        cnn(config)
        config.method.ofd.teacher_batch_stats = False

    assert plan_of("ofd", running).rows
