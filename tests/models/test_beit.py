import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.networks import count_parameters, images, initial, shapes
from xkd_jax.errors import UserError
from xkd_jax.methods.minilm import MiniLM
from xkd_jax.models import create_model
from xkd_jax.models.beit import RelativePositionBias

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def tiny(**args):
    return create_model("beit_base_patch16_224", num_classes=5, **{**TINY, **args})


@pytest.mark.exhaustive
def test_parameter_count_is_timms():
    model = create_model("beit_base_patch16_224", num_classes=1000)
    assert count_parameters(model) == 86_530_984  # timm 1.0.31's


def test_beit_out():
    qkv = {f"{block}{name}": (2, 2, 16, 8) for block in ("", "block01_", "block02_")
           for name in ("query", "key", "value")}  # fmt: skip
    prefix = {f"prefix_{name}": (2, 2, 1, 8) for name in ("query", "key", "value")}
    bias = {f"{block}bias": (1, 2, 16, 16) for block in ("", "block01_", "block02_")}
    block = (2, 16, 16)
    plain = qkv | prefix | {
        "grid": (4, 4), "block01": block, "block02": block, "tokens": block, "cls": (2, 16),
        "pooled": (2, 16), "logits": (2, 5),
    }  # fmt: skip
    assert shapes(tiny(), images()) == plain | bias | {"prefix_bias": (1, 2, 17, 17)}
    assert shapes(tiny(use_rel_pos_bias=False), images()) == plain


def test_the_bias_is_that_of_the_difference_in_position():
    rows = np.arange(25 + 3, dtype=np.float32)
    table = {"relative_position_bias_table": jnp.stack([rows, -rows], axis=1)}
    bias = jax.jit(RelativePositionBias(2).apply)({"params": table}, jnp.zeros((1, 1 + 9, 4)))
    bias = np.asarray(bias)
    assert bias.shape == (1, 2, 10, 10)
    np.testing.assert_array_equal(bias[0, 1], -bias[0, 0])
    bias = bias[0, 0]
    for query in range(9):
        for key in range(9):
            row, column = query // 3 - key // 3, query % 3 - key % 3
            assert bias[1 + query, 1 + key] == (row + 2) * 5 + column + 2
    # The class token's query, its key, and both.
    assert (bias[0, 1:] == 25).all()
    assert (bias[1:, 0] == 26).all()
    assert bias[0, 0] == 27


@pytest.mark.exhaustive
def test_starts_as_timms():
    block, head = initial(tiny(embed_dim=64), "blocks_1", "head")
    np.testing.assert_allclose(block["attn"]["qkv"]["kernel"].std(), 0.02, rtol=0.05)
    for kernel in (block["attn"]["proj"]["kernel"], block["mlp"]["fc2"]["kernel"]):
        np.testing.assert_allclose(kernel.std(), 0.02 / 2, rtol=0.05)  # sqrt(2 * 2)
    np.testing.assert_allclose(head["kernel"].std(), 2e-5, rtol=0.2)
    for name in ("q_bias", "v_bias", "relative_position_bias_table"):
        assert not block["attn"][name].any()
    assert (block["gamma_1"] == jnp.float32(0.1)).all()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"img_size": 30}, "img_size 30 must be a multiple of patch_size 8"),
        ({"global_pool": "max"}, "unknown global_pool 'max'"),
        ({"num_heads": 3}, "embed_dim 16 must be a multiple of num_heads 3"),
    ],
)
def test_wrong_values(args, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(tiny(**args).init, jax.random.key(0), images())


@pytest.mark.slow
def test_minilm_imitates_attention_with_the_class_tokens_biases():
    model = tiny(depth=1)
    variables, x = jax.jit(model.init)(jax.random.key(0), images()), images()
    _, student = jax.jit(model.apply)(variables, x)
    table = variables["params"]["blocks_0"]["attn"]["relative_position_bias_table"]
    biased = jax.tree.map(lambda leaf: leaf, variables)
    biased["params"]["blocks_0"]["attn"]["relative_position_bias_table"] = table.at[-3].set(1.0)
    _, teacher = jax.jit(model.apply)(biased, x)

    def attention(teacher):
        args = {}, jax.random.key(0), jnp.zeros(())
        return MiniLM().loss({}, {}, teacher, student, *args).metrics["minilm_attention"]

    # Equal for all keys but its own, which the softmax feels.
    assert abs(attention(student)) < 1e-6
    assert attention(teacher) > 1e-4
