"""MiniLM's attention and relations, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.outputs import cnn, gradient_fn, reached, swin, vit
from tests.methods.test_logits import softmax
from xkd_jax.errors import UserError
from xkd_jax.methods.base import PairError
from xkd_jax.methods.minilm import MiniLM, regroup

pytestmark = pytest.mark.usefixtures("quick_compilation")


def small_swin(seed):
    return swin(seed, sides=(16, 8, 4, 2), widths=(4, 4, 4, 8))


# Teacher and student; for v2 with different numbers of heads.
PAIRS = {
    "v1": lambda: (vit(0, width=12), vit(1, width=8)),
    "v2": lambda: (vit(0, width=12, heads=3), vit(1, width=8)),
    "v1, Swin": lambda: (small_swin(0), vit(1, side=2)),
    "v2, Swin": lambda: (vit(0, side=2, heads=4), small_swin(1)),
}


def method_and_pair(name):
    return MiniLM(variant=name[:2], relation_heads=4), *PAIRS[name]()


def split(x, heads):
    """[H, T, d] -> a list of [T, H * d / heads], one per relation head."""
    joined = np.concatenate(list(np.float64(x)), axis=-1)
    return np.split(joined, heads, axis=-1)


def divergence(student, teacher):
    """KL(teacher || student) of softmax(A B^T / sqrt(d)), the mean over rows, of (A, B) twice."""
    (a, b), (c, d) = student, teacher
    s, t = softmax(a @ b.T / np.sqrt(a.shape[-1])), softmax(c @ d.T / np.sqrt(c.shape[-1]))
    return sum(p * np.log(p / q) for p, q in zip(t.ravel(), s.ravel(), strict=True)) / len(s)


def all_tokens(out, name):
    """The class token and the patches of a ViT."""
    return np.concatenate([out[f"prefix_{name}"][:, :, :1], out[name]], axis=2)


def expected(student, teacher, names, heads):
    """One term: the mean over images and heads."""
    found = []
    for image in range(len(student["query"])):
        taps = [
            [split(all_tokens(out, name)[image], heads) for name in names]
            for out in (student, teacher)
        ]
        for head in range(heads):
            found.append(divergence(*[[tap[head] for tap in pair] for pair in taps]))
    return np.mean(found)


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_terms_are_divergences_of_relations(name):
    method, teacher, student = method_and_pair(name)
    method.check(teacher, student)
    assert method.init(jax.random.key(0), teacher, student) == ({}, {})
    relations = {"attention": ("query", "key"), "value": ("value", "value")}
    if name == "v2":
        relations = {part: (part, part) for part in ("query", "key", "value")}
    heads = 4 if name == "v2" else 2
    terms = {
        f"minilm_{term}": expected(student, teacher, names, heads)
        for term, names in relations.items()
    }
    args = {}, {}, teacher, student, {}, jax.random.key(0), jnp.zeros(())
    loss, _, metrics, _ = method.loss(*args)
    assert {k for k in metrics if not k.endswith("weighted")} == terms.keys()
    for term, value in terms.items():
        np.testing.assert_allclose(metrics[term], value, rtol=1e-5)
    np.testing.assert_allclose(loss, sum(terms.values()), rtol=1e-5)


def test_relation_heads_are_split_from_the_joined_heads():
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
    for heads in (1, 2, 6, 12):
        found = regroup(jnp.asarray(x), heads)
        assert found.shape == (2, heads, 5, 12 // heads)
        for image in range(2):
            np.testing.assert_allclose(found[image], split(x[image], heads))
    np.testing.assert_array_equal(regroup(jnp.asarray(x), 3), x)


def test_the_class_token_counts_if_both_have_one_and_the_distillation_token_does_not():
    method, teacher, student = MiniLM(), vit(0), vit(1, distilled=True)

    def terms(teacher, student):
        args = {}, {}, teacher, student, {}, jax.random.key(0), jnp.zeros(())
        return method.loss(*args).metrics

    whole = terms(teacher, student)
    other = {f"prefix_{m}": student[f"prefix_{m}"].at[:, :, 1].add(1.0) for m in ("query", "key")}
    assert terms(teacher, student | other) == whole
    bare = {name: x for name, x in teacher.items() if not name.startswith("prefix_")}
    patches_only = terms(bare, student)
    assert patches_only["minilm_value"] != whole["minilm_value"]
    registers = {name: x for name, x in teacher.items() if name != "cls"}
    assert terms(registers, student) == patches_only


def test_attention_includes_a_swins_position_bias():
    teacher, student = PAIRS["v1, Swin"]()
    args = {}, jax.random.key(0), jnp.zeros(())
    plain = teacher | {"bias": jnp.zeros_like(teacher["bias"])}
    (one, other) = (MiniLM().loss({}, {}, out, student, *args).metrics for out in (teacher, plain))
    assert one["minilm_attention"] != other["minilm_attention"]
    assert one["minilm_value"] == other["minilm_value"]


@pytest.mark.parametrize("name", PAIRS)
def test_every_pair_of_transformers_learns(name):
    method, *outs = method_and_pair(name)
    method.check(*outs)
    gradient = gradient_fn(method, *outs)
    loss, (_, teacher, student) = jax.device_get(gradient({}, *outs))
    assert reached(teacher) == set()
    names = {"query", "key", "value"}
    if "Swin" not in name:
        names |= {f"prefix_{tap}" for tap in names}
    elif name == "v1, Swin":
        assert "bias" in outs[0]
    assert reached(student) == names
    stepped = outs[1] | {k: np.asarray(outs[1][k]) - 0.1 * student[k] for k in reached(student)}
    assert gradient({}, outs[0], stepped)[0] < loss


def test_queries_scaled_against_keys_are_the_same_attention():
    method, teacher, student = method_and_pair("v1")
    args = {}, jax.random.key(0), jnp.zeros(())
    term = method.loss({}, {}, teacher, student, *args).metrics["minilm_attention"]
    student |= {f"{kind}query": 4 * student[f"{kind}query"] for kind in ("", "prefix_")}
    student |= {f"{kind}key": student[f"{kind}key"] / 4 for kind in ("", "prefix_")}
    scaled = method.loss({}, {}, teacher, student, *args).metrics["minilm_attention"]
    np.testing.assert_allclose(scaled, term, rtol=1e-5)
    same = method.loss({}, {}, teacher, teacher, *args).value
    np.testing.assert_allclose(same, 0, atol=1e-6)


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        (cnn(0), vit(1), "this teacher is a CNN"),
        (vit(0), cnn(1), "this student is a CNN"),
        (vit(0, side=4), vit(1, side=2), "the teacher's grid is 4x4 and the student's is 2x2"),
    ],
)
def test_networks_without_the_same_tokens_are_refused(teacher, student, message):
    for variant in ("v1", "v2"):
        with pytest.raises(PairError, match=message):
            MiniLM(variant=variant).check(teacher, student)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "v3"}, "variant of minilm 'v3'; did you mean v2 or v1"),
        ({}, "the teacher has 4 heads and the student 2; set method.minilm.variant to 'v2'"),
        ({"variant": "v2"}, "relation_heads=48 must divide the teacher's width, 12, and .* 8"),
        ({"variant": "v2", "relation_heads": 0}, "relation_heads=0 must divide"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        MiniLM(**options).check(vit(0, width=12, heads=4), vit(1, width=8, heads=2))
