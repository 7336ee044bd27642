"""Where CAKD taps the two networks, and the networks and options that it refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typing_extensions import override

from tests.methods.cakd_reference import method_params, np_softmax, outputs, run_loss
from tests.methods.outputs import cnn, reached, swin, vit
from xkd_jax.distiller import Distiller, train_step
from xkd_jax.errors import UserError
from xkd_jax.methods import METHODS, align, cakd, create_method
from xkd_jax.methods.base import Method, PairError
from xkd_jax.methods.cakd import CAKD
from xkd_jax.methods.cakd_release import CAKDRelease
from xkd_jax.model import create_model
from xkd_jax.optim import create_optimizer

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_teacher_block_taps_an_earlier_block():
    out, _ = outputs()
    for block, name in ((-1, "block03"), (-2, "block02"), (-3, "block01")):
        tapped, tokens = cakd.teacher_taps(out, block)
        for one, m in zip(tapped, ("query", "key", "value"), strict=True):
            np.testing.assert_array_equal(one, out[f"{name}_{m}"])
        if block == -1:
            np.testing.assert_array_equal(tokens, out["tokens"])
        else:
            x = np.float64(out[name])
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
            np.testing.assert_allclose(tokens, x, atol=1e-5)


def test_teacher_block_counts_past_nine():
    out = {f"block{i:02d}{m}": jnp.full((1, 1, 1, 1), 1.0 * i)
           for i in range(1, 13) for m in ("", "_query", "_key", "_value")}  # fmt: skip
    assert [cakd.teacher_taps(out, block)[0][0].item() for block in (-2, -4, -12)] == [11, 9, 1]


def test_teacher_block_changes_the_loss():
    teacher, student = outputs()
    _, last = run_loss(CAKD(), teacher, student)
    _, before = run_loss(CAKD(teacher_block=-2), teacher, student)
    for name in ("attention", "value_relation", "tokens"):
        assert last[name] != before[name]


def small_swin():
    """Two blocks in a last stage that has one window."""
    teacher, student = swin(0, sides=(16, 8, 4, 4)), cnn(1, sides=(16, 8, 4, 2))
    return teacher | {f"block03_{m}": teacher[f"block04_{m}"] for m in ("query", "bias")}, student


def test_a_swins_bias_is_part_of_the_teachers_attention_alone():
    teacher, student = small_swin()
    plain = teacher | {"bias": jnp.zeros_like(teacher["bias"])}
    losses = [run_loss(CAKD(), out, student)[1] for out in (teacher, plain)]
    assert losses[0].pop("attention") != losses[1].pop("attention")
    assert losses[0]["value_relation"] == losses[1]["value_relation"]
    taps, bias = cakd.teacher_taps(teacher, -1)[0], np.asarray(teacher["bias"], np.float64)
    q, k, v = (np.float64(tap) for tap in taps)
    weights = np_softmax(np.einsum("nhqd,nhkd->nhqk", q, k) / np.sqrt(q.shape[-1]) + bias)
    expected = np.einsum("nhqk,nhkd->nhqd", weights, v)
    np.testing.assert_allclose(cakd.attention(*taps, teacher["bias"]), expected, atol=1e-5)
    to_bias = jax.grad(lambda b: run_loss(CAKD(), teacher | {"bias": b}, student)[0])
    assert not to_bias(teacher["bias"]).any()


def test_a_block_of_an_earlier_stage_is_refused():
    teacher, student = small_swin()
    for block in (-1, -2):
        CAKD(teacher_block=block).check(teacher, student)
    with pytest.raises(UserError, match=r"an earlier stage of this Swin.*; take -1 .* to -2"):
        CAKD(teacher_block=-3).check(teacher, student)


def test_a_swin_whose_last_map_is_padded_is_refused():
    teacher, student = small_swin()
    padded = {name: x for name, x in teacher.items() if not name.endswith("bias")}
    with pytest.raises(PairError, match="pads its last map, 4x4, to whole windows"):
        CAKD().check(padded, student)


def test_teacher_taps_are_float32():
    out = {name: jnp.asarray(x, jnp.bfloat16) for name, x in outputs()[0].items() if name != "grid"}
    for block in (-1, -2):
        assert {x.dtype for x in jax.tree.leaves(cakd.teacher_taps(out, block))} == {
            jnp.dtype("float32")
        }


def stages(*grids):
    return {f"stage{i}": np.zeros((1, *grid, 3)) for i, grid in enumerate(grids, 1)}


@pytest.mark.parametrize(
    ("grids", "stage"),
    [
        ([(56, 56), (28, 28), (14, 14), (7, 7)], "stage3"),  # the teacher's own grid
        ([(32, 32), (16, 16), (8, 8), (4, 4)], "stage2"),  # the nearest finer one
        ([(56, 56), (28, 28), (14, 13), (7, 7)], "stage2"),  # finer in both directions
        ([(12, 12), (6, 6), (3, 3), (2, 2)], "stage1"),  # all are coarser
    ],
)
def test_auto_chooses_the_stage_that_meets_the_grid(grids, stage):
    assert align.choose_stage(stages(*grids), (14, 14), "auto") == stage


@pytest.mark.parametrize(
    ("teacher", "student", "grids", "stage"),
    [
        ((384, 24), 224, (56, 28, 14, 7), "stage3"),  # a ViT/16: the nearest finer is 28x28
        ((384, 12), 224, (56, 28, 14, 7), "stage4"),  # a ViT/32 or a Swin
        ((384, 24), 200, (50, 25, 13, 7), "stage3"),
        ((384, 24), 299, (71, 35, 17, 8), "stage3"),  # Inception-v3, without padding
        ((384, 24), 192, (48, 24, 12, 6), "stage3"),  # stage2 has the same grid by chance
        ((384, 24), 384, (96, 48, 24, 12), "stage3"),
        ((224, 14), 299, (71, 35, 17, 8), "stage3"),  # larger images of the student: by grid
        ((224, 14), 32, (32, 16, 8, 4), "stage2"),  # no stage has a stride of 16: by grid
    ],
)
def test_larger_images_of_the_teacher_match_stages_by_place(teacher, student, grids, stage):
    (side, tokens), out = teacher, stages(*[(grid, grid) for grid in grids])
    assert align.choose_stage(out, (tokens, tokens), "auto", (side, student)) == stage


def test_the_method_says_which_stage_it_chose():
    shape = jax.ShapeDtypeStruct((1, 2, 576, 3), jnp.float32)
    teacher = {"grid": (24, 24), "side": 384, "block12": shape, "query": shape, "tokens": shape}
    student = stages((56, 56), (28, 28), (14, 14), (7, 7)) | {"side": 224}
    expected = "tapped at stage3, 14x14, and the teacher at block 12, 24x24 tokens: the same place"
    assert expected in CAKD().describe(teacher, student)
    assert "28x28" in CAKD(student_stage="stage2").describe(teacher, student)
    both = create_method("logits+cakd", {}).describe(teacher, student)
    assert both == CAKD().describe(teacher, student)
    assert METHODS["logits"].describe(teacher, student) == ""


def test_the_training_step_tells_methods_the_sides_of_the_images():
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Sides(Method):
        needs_teacher = True

        @override
        def loss(self, params, state, teacher_out, student_out, *rest):
            seen.append((teacher_out["side"], student_out["side"]))
            return super().loss(params, state, teacher_out, student_out, *rest)

    args = {"img_size": 48, "embed_dim": 4, "depth": 1, "num_heads": 1}
    teacher = create_model("vit_tiny_patch16_224", num_classes=3, **args)
    student = create_model("resnet8", num_classes=3, image_size=32)
    teacher = dataclasses.replace(teacher, variables=teacher.shapes)
    distiller = Distiller(teacher, student, Sides(), create_optimizer({}, lambda step: 0.1))
    batch = {"image": jnp.zeros((2, 40, 40, 3)), "label": jnp.zeros(2, int), "index": jnp.arange(2)}
    step = functools.partial(train_step, distiller)
    jax.eval_shape(step, distiller.state_shapes, teacher.shapes, batch)
    assert set(seen) == {(48, 32)}


def test_a_384_pixel_teacher_meets_stage3():
    """Teacher and student of other image sizes, by the real networks' shapes."""
    teacher = create_model("vit_base_patch16_384", num_classes=3, depth=1)
    student = create_model("resnet18", num_classes=3, image_size=224)
    outs = teacher.output_shapes, student.output_shapes
    assert [out["side"] for out in outs] == [384, 224]
    assert "stage3, 14x14" in CAKD().describe(*outs)


def test_a_stage_can_be_named():
    out = stages((56, 56), (28, 28), (14, 14), (7, 7))
    assert align.choose_stage(out, (14, 14), "stage4") == "stage4"
    teacher, student = outputs()
    losses = [run_loss(CAKD(student_stage=s), teacher, student)[0] for s in ("stage1", "stage2")]
    assert losses[0] != losses[1]
    assert run_loss(CAKD(), teacher, student)[0] == losses[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"student_stage": "stage9"},
            "no stage 'stage9'; it has stage1, stage2, stage3, or 'auto'",
        ),
        ({"generator": "saturated"}, "did you mean saturating"),
        ({"teacher_block": -4}, r"-1 \(the last\) to -3 \(the first\)"),
        ({"teacher_block": 0}, "teacher_block=0 doesn't exist"),
        ({"adversary_every": 0}, "at least 1"),
        ({"adversary_clock": "epochs"}, "adversary clock 'epochs'; did you mean epoch"),
    ],
)
def test_wrong_options_are_refused(options, message):
    CAKD().check(*outputs())
    with pytest.raises(UserError, match=message):
        CAKD(**options).check(*outputs())


def test_wrong_networks_are_refused():
    teacher, student = outputs()
    with pytest.raises(PairError, match="this teacher is a CNN"):
        CAKD().check(student, student)
    with pytest.raises(PairError, match=r"stage3 of the student .* this student has no stages"):
        CAKDRelease().check(teacher, teacher)


@pytest.mark.parametrize("kind", [vit, swin])
def test_a_transformer_student_is_tapped_at_its_tokens(kind):
    """A ViT at its final tokens, a Swin at the stage that meets the teacher's grid."""
    teacher, student = vit(0, side=4), kind(1, side=2) if kind is vit else kind(1)
    method = CAKD(token_dropout=0.0)
    method.check(teacher, student)
    tap = "tokens" if kind is vit else "stage2"
    assert f"tapped at {tap}, " in method.describe(teacher, student)
    features = method._student_map(teacher, student)
    if kind is vit:
        expected = align.resize_map(student["tokens"].reshape(4, 2, 2, 8), (4, 4))
        np.testing.assert_allclose(features, expected)
    params, adversary = method_params(method, teacher, student)

    def loss(params, of_teacher, of_student):
        outs = teacher | of_teacher, student | of_student
        return method.loss(params, {}, *outs, {}, jax.random.key(0), 0.0, adversary).value

    arrays = ({k: v for k, v in out.items() if k != "grid"} for out in (teacher, student))
    of_params, of_teacher, of_student = jax.jit(jax.grad(loss, (0, 1, 2)))(params, *arrays)
    assert reached(of_teacher) == set()
    assert reached(of_student) == {tap}
    assert all(leaf.any() for leaf in jax.tree.leaves(of_params))


def test_the_adversary_moves_every_fifth_step():
    assert (CAKD().adversary_period, CAKD().adversary_clock) == (5, "step")
    assert CAKD(adversary_every=2).adversary_period == 2
