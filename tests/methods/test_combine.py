"""Several methods at once, and methods by name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typing_extensions import override

from xkd_jax.config import default_config
from xkd_jax.errors import UserError
from xkd_jax.methods import METHODS, create_method
from xkd_jax.methods.base import Method, MethodLoss, PairError
from xkd_jax.methods.cakd import CAKD
from xkd_jax.methods.combine import Sum
from xkd_jax.methods.logits import Logits

OPTIONS = {"cakd": {"token_weight": 2.0}, "logits": {"weight": 0.5, "temperature": 2.0}}
PARTS = {"cakd": CAKD(token_weight=2.0), "logits": Logits(weight=0.5, temperature=2.0)}


pytestmark = pytest.mark.usefixtures("quick_compilation")


def outputs():
    """Random outputs of a teacher and a student with a grid of 2x2."""
    rng = np.random.default_rng(0)

    def draw(**shapes):
        return {k: jnp.asarray(rng.normal(size=s).astype(np.float32)) for k, s in shapes.items()}

    heads = (2, 2, 4, 3)
    teacher = draw(query=heads, key=heads, value=heads, tokens=(2, 4, 6), logits=(2, 5))
    teacher |= {"grid": (2, 2)} | draw(block01=(2, 4, 6))
    return teacher, draw(stage1=(2, 2, 2, 3), logits=(2, 5))


def run_loss(method, params, state, key, adversary):
    batch = {"index": jnp.arange(2), "label": jnp.zeros(2, int)}
    return method.loss(params, state, *outputs(), batch, key, jnp.zeros(()), adversary)


@pytest.mark.parametrize("order", [("cakd", "logits"), ("logits", "cakd")])
def test_a_sum_is_the_sum_of_its_parts(order):
    method = create_method("+".join(order), OPTIONS)
    assert isinstance(method, Sum)
    method.check(*outputs())
    key = jax.random.key(0)
    params, state = method.init(key, *outputs())
    adversary = method.init_adversary(key, *outputs())
    assert params.keys() == state.keys() == set(order)
    loss, new_state, metrics, _ = run_loss(method, params, state, key, adversary)
    total, expected_metrics = 0, {}
    for i, name in enumerate(order):
        part_key = jax.random.fold_in(key, i)
        part = run_loss(PARTS[name], params[name], {}, part_key, adversary)
        total, expected_metrics = total + part.value, expected_metrics | part.metrics
    np.testing.assert_allclose(loss, total, rtol=1e-6)
    assert metrics == expected_metrics
    assert {"tokens", "tokens_weighted", "logits_kl"} < metrics.keys()
    assert new_state == state


@pytest.mark.parametrize("name", ["cakd+logits", "logits+cakd"])
def test_the_adversary_is_cakds(name):
    method, key = create_method(name, OPTIONS), jax.random.key(0)
    assert method.adversary_period == 5
    assert method.needs_teacher
    assert method.multi_view
    params, state = method.init(key, *outputs())
    adversary = method.init_adversary(key, *outputs())
    ours = PARTS["cakd"].init_adversary(key, *outputs())
    assert jax.tree.all(jax.tree.map(jnp.array_equal, adversary, ours))
    judged = run_loss(method, params, state, key, adversary).judged
    loss, metrics = method.adversary_loss(adversary, judged)
    part_key = jax.random.fold_in(key, name.split("+").index("cakd"))
    part = run_loss(PARTS["cakd"], params["cakd"], {}, part_key, adversary)
    expected, _ = PARTS["cakd"].adversary_loss(adversary, part.judged)
    assert loss == expected == metrics["discriminator"]


def test_the_adversarys_clock_is_cakds():
    assert create_method("logits+cakd", OPTIONS).adversary_clock == "step"
    options = {"cakd": {"adversary_clock": "epoch"}}
    assert create_method("logits+cakd", options).adversary_clock == "epoch"


def test_parts_get_keys_of_their_own():
    class Keyed(Method):
        @override
        def loss(self, params, state, teacher_out, student_out, batch, key, progress, adversary):
            return MethodLoss(jax.random.uniform(key), {"count": state["count"] + 1}, {})

    method = Sum(parts=(("a", Keyed()), ("b", Keyed())))
    key, state = jax.random.key(0), {"a": {"count": 1}, "b": {"count": 5}}
    loss, new_state, *_ = run_loss(method, {"a": {}, "b": {}}, state, key, {})
    one, two = (Sum(parts=(part,)) for part in method.parts)
    alone = run_loss(one, {"a": {}}, state, key, {})[0]
    assert alone == run_loss(two, {"b": {}}, state, key, {})[0]  # both are first
    assert loss != 2 * alone
    assert new_state == {"a": {"count": 2}, "b": {"count": 6}}


def test_the_label_term_has_the_smallest_weight_and_the_logits_that_one_part_names():
    assert create_method("cakd+logits", {}).label_weight == 0.1
    assert create_method("cakd+logits", {"logits": {"label_weight": 2.0}}).label_weight == 1.0
    student = {"logits": jnp.zeros(3), "cls_logits": jnp.ones(3)}
    for name in ("logits+deit", "deit+logits"):
        assert create_method(name, {}).label_logits(student) is student["cls_logits"]
    assert create_method("cakd+logits", {}).label_logits(student) is student["logits"]


def test_the_longest_first_phase_is_the_sums():
    options = {"ab": {"first_epochs": 7}, "ft": {"first_epochs": 9}}
    assert create_method("ab+logits", options).first_phase == 7
    assert create_method("ft+ab", options).first_phase == 9
    assert create_method("cakd+logits", options).first_phase == 0


@pytest.mark.parametrize(("progress", "first"), [(-1.0, True), (0.0, False)])
def test_parts_freeze_what_is_theirs_and_the_student_if_all_active_ones_agree(progress, first):
    parts = {"paraphraser": first, "translator": not first}
    moves = create_method("logits+ft", {}).moves(jnp.float32(progress))
    assert bool(moves["student"]) == (not first)
    assert moves["method"] == {"logits": True, "ft": parts}
    moves = create_method("ft+ab", {}).moves(jnp.float32(progress))
    assert bool(moves["student"])  # ab trains it from the start
    assert moves["method"] == {"ft": parts, "ab": first}
    assert create_method("cakd+logits", {}).moves(progress)["student"] is True


def test_every_part_sees_the_training_labels():
    class Counting(Method):
        @override
        def init(self, key, teacher_out, student_out, labels=()):
            return {}, {"counts": jnp.bincount(jnp.asarray(labels), length=3)}

    method = Sum(parts=(("a", Counting()), ("b", Counting())))
    _, state = method.init(jax.random.key(0), {}, {}, [0, 2, 2])
    for part in "ab":
        np.testing.assert_array_equal(state[part]["counts"], [1, 0, 2])


def test_a_sum_without_cakd_has_no_adversary_and_no_views():
    method = create_method("none+logits", {})
    assert not method.adversary_period
    assert not method.multi_view
    assert method.needs_teacher
    assert not create_method("none", {}).needs_teacher


def test_one_name_is_that_method():
    assert create_method("cakd", OPTIONS) == PARTS["cakd"]
    assert create_method("logits", OPTIONS) == PARTS["logits"]
    assert create_method("logits", {}) == Logits()


def test_the_configs_options_are_the_methods_defaults():
    config = default_config()
    for name, method in METHODS.items():
        assert create_method(name, config.method) == method
        assert config.method[name].to_dict() == dataclasses.asdict(method)
    config.method.cakd.adversarial_weight = 0.25
    assert create_method("cakd", config.method) == CAKD(adversarial_weight=0.25)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cakd+cakd", {}, "'cakd[+]cakd' names a method twice"),
        ("logits+cakd+logits", {}, "names a method twice"),
        ("cackd", {}, "unknown method 'cackd'; did you mean cakd"),
        ("cakd+logit", {}, "unknown method 'logit'; did you mean logits"),
        ("", {}, "unknown method ''; known: .*cakd, cakd_release, .*logits, .*none"),
        (
            "logits",
            {"logits": {"temprature": 1.0}},
            "unknown option of method logits 'temprature'; did you mean temperature",
        ),
        ("cakd", {"cakd": {"token_weight": "1"}}, "cakd.token_weight is '1', .* of type float"),
        ("cakd", {"cakd": {"adversary_every": 5.0}}, "adversary_every is 5.0, .* of type int"),
        ("cakd", {"cakd": {"adversary_every": True}}, "adversary_every is True, .* of type int"),
    ],
)
def test_wrong_names_and_options_are_refused(name, options, message):
    with pytest.raises(UserError, match=message):
        create_method(name, options)


def test_a_part_without_an_adversary_gets_none():
    class Adversarial(Method):
        adversary_period = 1

        @override
        def loss(self, params, state, teacher_out, student_out, batch, key, progress, adversary):
            return MethodLoss(adversary["loss"], {}, {})

    silent = CAKD(adversarial_weight=0.0)
    method, key = Sum(parts=(("cakd", silent), ("other", Adversarial()))), jax.random.key(0)
    params, _ = silent.init(key, *outputs())
    loss, _, metrics, _ = run_loss(
        method, {"cakd": params, "other": {}}, {"cakd": {}, "other": {}}, key, {"loss": 2.0}
    )
    alone = run_loss(silent, params, {}, jax.random.fold_in(key, 0), {}).value
    np.testing.assert_allclose(loss, alone + 2.0, rtol=1e-6)
    assert "generator" not in metrics


def test_two_adversaries_are_refused():
    with pytest.raises(UserError, match="two methods with an adversary"):
        create_method("cakd+cakd_release", {}).check(*outputs())


def test_a_sum_checks_every_part():
    teacher, student = outputs()
    with pytest.raises(PairError, match="this teacher is a CNN"):
        create_method("logits+cakd", {}).check(student, student)
    with pytest.raises(PairError, match="this student has no stages"):
        create_method("logits+cakd_release", {}).check(teacher, teacher)
