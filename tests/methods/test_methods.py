"""The registry of methods: their documentation, their options and the pairs that they support."""

import dataclasses
import re
import sys

import jax
import pytest

from tests.methods.outputs import cnn, swin, vit
from xkd_jax.errors import UserError
from xkd_jax.methods import METHODS, check_pair, create_method
from xkd_jax.methods.base import PairError

pytestmark = pytest.mark.usefixtures("quick_compilation")

DISTILLING = {name: method for name, method in METHODS.items() if method.needs_teacher}
BASELINES = {"logits", "fitnet", "at", "irg", "rkd", "crd", "ofd", "review", "london", "afd", "ab"}
BASELINES |= {"ft", "deit", "minilm"}
LATER = {"dkd", "dist", "ofa", "rsd"}  # than the paper
SOURCE = r"arXiv:\d{4}\.\d{4,5}|(ACCV|CVPR) 20\d\d|openreview\.net|github\.com"


def test_the_fourteen_baselines_later_methods_and_the_papers_own_are_there():
    assert len(BASELINES) == 14
    assert DISTILLING.keys() == BASELINES | LATER | {"cakd", "cakd_release"}
    assert METHODS.keys() == DISTILLING.keys() | {"none"}


@pytest.mark.parametrize("name", DISTILLING)
def test_every_method_names_its_source_and_its_options(name):
    module = sys.modules[type(METHODS[name]).__module__]
    assert re.search(SOURCE, module.__doc__)
    own = {field.name for field in dataclasses.fields(METHODS[name])}
    inherited = {
        field.name for cls in type(METHODS[name]).__mro__[1:-1] for field in dataclasses.fields(cls)
    }
    documented = set(re.findall(r"^ {6}(\w+):", type(METHODS[name]).__doc__, re.MULTILINE))
    assert own - inherited <= documented <= own


@pytest.mark.parametrize("name", METHODS)
def test_the_authors_imagenet_options_are_options(name):
    method = create_method(name, {name: METHODS[name].imagenet})
    for option, value in METHODS[name].imagenet.items():
        assert getattr(method, option) == value != getattr(METHODS[name], option)


def test_methods_compare_by_value():
    """The training step is compiled for a method; equal options must not recompile it."""
    for name, method in METHODS.items():
        assert hash(create_method(name, {})) == hash(method)
        assert create_method(name, {}) == method


PAIRS = {
    ("cakd", "CNN", "CNN"): "cakd taps a Transformer's query, key and value, but this teacher",
    ("cakd_release", "ViT", "ViT"): "stage3 of the student .*, but this student has no stages",
    ("deit", "ViT", "CNN"): "deit trains a distillation token, but this student has none",
    ("minilm", "CNN", "ViT"): "minilm compares the attention of two Transformers, but this teacher",
    ("minilm", "Swin", "ViT"): "minilm compares token by token, but the teacher's grid is 1x1",
    ("logits+minilm", "ViT", "CNN"): "minilm compares .*, but this student is a CNN",
}
NETWORKS = {"CNN": cnn, "ViT": vit, "Swin": swin}


def shapes(kind, seed):
    """What `check` sees before training: no arrays."""
    out = NETWORKS[kind](seed, n=1)
    return {k: v if k == "grid" else jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in out.items()}


@pytest.mark.parametrize(("name", "teacher", "student"), PAIRS)
def test_a_refusal_names_methods_that_support_the_pair(name, teacher, student):
    method, outs = create_method(name, {}), (shapes(teacher, 0), shapes(student, 1))
    with pytest.raises(UserError, match=PAIRS[name, teacher, student]) as info:
        check_pair(method, *outs)
    assert not isinstance(info.value, PairError)
    text = str(info.value)
    assert text.count(".") == 1 == text.count(";")
    proposed = re.split(", | or ", text.removesuffix(".").split("; for this pair take ")[1])
    assert "logits" in proposed
    assert "none" not in proposed
    for other in DISTILLING:
        if other in proposed:
            check_pair(METHODS[other], *outs)
        else:
            with pytest.raises(UserError):
                check_pair(METHODS[other], *outs)


@pytest.mark.parametrize(
    ("teacher", "student"),
    [("ViT", "CNN"), ("CNN", "CNN"), ("Swin", "CNN"), ("ViT", "ViT"), ("ViT", "Swin")],
)
def test_pairs_that_fit_pass(teacher, student):
    outs = shapes(teacher, 0), shapes(student, 1)
    for name in ("logits", "afd", "at", "logits+afd", *["cakd"] * (teacher != "CNN")):
        check_pair(create_method(name, {}), *outs)


def test_a_wrong_option_is_not_taken_for_a_wrong_pair():
    method = create_method("logits", {"logits": {"temperature": 0.0}})
    with pytest.raises(UserError, match=r"must be above 0\.$"):
        check_pair(method, shapes("ViT", 0), shapes("CNN", 1))
