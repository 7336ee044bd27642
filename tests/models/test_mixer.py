import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.outputs import cnn, vit
from tests.models.networks import count_parameters, images, init, initial, shapes
from xkd_jax.errors import UserError
from xkd_jax.methods import METHODS, check_pair
from xkd_jax.methods.base import arrays_of, split_static
from xkd_jax.methods.reads import example_batch
from xkd_jax.models import create_model

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = {"img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 8}


def tiny(**args):
    return create_model("mixer_b16_224", num_classes=5, **{**TINY, **args})


def test_parameter_count_is_timms():
    assert count_parameters(create_model("mixer_b16_224", num_classes=1000)) == 59_880_472


def test_taps():
    out = shapes(tiny(), images())
    blocks = {name: out.pop(name) for name in ("block01", "block02", "tokens")}
    assert set(blocks.values()) == {(2, 16, 8)}
    assert out == {"grid": (4, 4), "pooled": (2, 8), "logits": (2, 5)}
    assert "logits" not in shapes(create_model("mixer_b16_224", num_classes=0, **TINY), images())


def test_the_first_mlp_mixes_tokens_and_the_second_channels():
    model = tiny(num_blocks=1)
    variables = init(model)
    apply, block = jax.jit(model.apply), variables["params"]["blocks_0"]
    assert block["mlp_tokens"]["fc1"]["kernel"].shape == (16, 4)
    assert block["mlp_channels"]["fc1"]["kernel"].shape == (8, 32)

    def changed(silent):
        """Which tokens of the block another first patch changes."""
        params = dict(variables["params"])
        mlp = {
            "fc1": block[silent]["fc1"],
            "fc2": jax.tree.map(jnp.zeros_like, block[silent]["fc2"]),
        }
        params["blocks_0"] = {**block, silent: mlp}
        x = images(1)
        both = jnp.concatenate([x, x.at[:, :8, :8].multiply(-1)])
        outs = apply({"params": params}, both)[1]["block01"]
        # Equal tokens of two images are equal up to rounding only, on some CPUs.
        return np.flatnonzero((np.abs(outs[0] - outs[1]) > 1e-5).any(-1)).tolist()

    assert changed("mlp_tokens") == [0]
    assert changed("mlp_channels") == list(range(16))


@pytest.mark.exhaustive
def test_initial_values_are_timms():
    block, head = initial(tiny(embed_dim=64), "blocks_0", "head")
    fc1 = block["mlp_channels"]["fc1"]
    assert jnp.abs(fc1["kernel"]).max() == pytest.approx((6 / (64 + 256)) ** 0.5, rel=0.01)
    assert 0 < jnp.abs(fc1["bias"]).max() < 1e-5
    assert not head["kernel"].any()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"num_blocks": 0}, "num_blocks must be at least 1, not 0"),
        ({"mlp_ratio": (0.1, 4.0)}, "at least one hidden unit each"),
        ({"img_size": 30}, "img_size 30 must be a multiple of patch_size 8"),
        ({"img_size": 64}, r"takes images \[N, 64, 64, 3\]"),
    ],
)
def test_wrong_values(args, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(tiny(**args).init, jax.random.key(0), images(1))


NEED_ATTENTION = {"cakd", "cakd_release", "minilm"}


def outputs(model):
    """The shapes of a network's outputs for one image, and its grid."""
    x, static = images(1), {}
    run = arrays_of(lambda key: model.apply(model.init(key, x), x)[1], static)
    return jax.eval_shape(run, jax.random.key(0)) | static


def test_methods_that_need_attention_refuse_it():
    mixer, refusal = outputs(tiny()), "is an MLP without attention; for this pair take "
    for name in ("cakd", "cakd_release"):
        with pytest.raises(UserError, match=f"this teacher {refusal}") as info:
            check_pair(METHODS[name], mixer, cnn(1, n=1))
        assert str(info.value).count(".") == 1
    for role, pair in (("teacher", (mixer, vit(1, n=1))), ("student", (vit(1, n=1), mixer))):
        with pytest.raises(UserError, match=f"this {role} {refusal}"):
            check_pair(METHODS["minilm"], *pair)


def loss_shape(method, teacher_out, student_out):
    """Traces the method's initialisation and loss."""
    arrays, static = zip(*map(split_static, (teacher_out, student_out)), strict=True)

    def run(teacher, student, key):
        teacher, student = teacher | static[0], student | static[1]
        params, state = method.init(key, teacher, student, np.arange(2))
        shapes = example_batch(1, student["logits"].shape[-1])
        batch = {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}
        return method.loss(params, state, teacher, student, batch, key, jnp.zeros(())).value

    return jax.eval_shape(run, *arrays, jax.random.key(0)).shape


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in METHODS if name not in NEED_ATTENTION])
def test_all_other_methods_take_it_and_a_convnext_as_teachers(name):
    students = [cnn(1, n=1, sides=(16, 8, 4, 2)), vit(1, n=1)]
    if name == "deit":
        students = [vit(1, n=1, distilled=True)]
    convnext = create_model("convnext_atto_32", num_classes=5, dims=(4, 6, 8, 10))
    for teacher in (tiny(), convnext):
        for student in students:
            outs = outputs(teacher), student
            check_pair(METHODS[name], *outs)
            assert loss_shape(METHODS[name], *outs) == ()
