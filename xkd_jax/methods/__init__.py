"""The distillation methods, by name. A new one is one file here and one line in METHODS."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from xkd_jax.errors import UserError, unknown
from xkd_jax.methods.ab import AB
from xkd_jax.methods.afd import AFD
from xkd_jax.methods.at import AT
from xkd_jax.methods.base import Method, Outputs, PairError
from xkd_jax.methods.cakd import CAKD
from xkd_jax.methods.cakd_release import CAKDRelease
from xkd_jax.methods.combine import Sum
from xkd_jax.methods.crd import CRD
from xkd_jax.methods.deit import DeiT
from xkd_jax.methods.dist import DIST
from xkd_jax.methods.dkd import DKD
from xkd_jax.methods.fitnet import FitNet
from xkd_jax.methods.ft import FT
from xkd_jax.methods.irg import IRG
from xkd_jax.methods.logits import Logits
from xkd_jax.methods.london import LONDON
from xkd_jax.methods.minilm import MiniLM
from xkd_jax.methods.ofa import OFA
from xkd_jax.methods.ofd import OFD
from xkd_jax.methods.review import ReviewKD
from xkd_jax.methods.rkd import RKD
from xkd_jax.methods.rsd import RSD

METHODS: dict[str, Method] = {
    "none": Method(),
    "logits": Logits(),
    "fitnet": FitNet(),
    "at": AT(),
    "irg": IRG(),
    "rkd": RKD(),
    "crd": CRD(),
    "ofd": OFD(),
    "review": ReviewKD(),
    "london": LONDON(),
    "afd": AFD(),
    "ab": AB(),
    "ft": FT(),
    "deit": DeiT(),
    "minilm": MiniLM(),
    "dkd": DKD(),
    "dist": DIST(),
    "ofa": OFA(),
    "rsd": RSD(),
    "cakd": CAKD(),
    "cakd_release": CAKDRelease(),
}

# The original authors' ImageNet settings; recipes apply them: config.method.update(IMAGENET).
IMAGENET = {name: dict(method.imagenet) for name, method in METHODS.items()}


def create_method(name: str, options: Mapping[str, Mapping[str, Any]]) -> Method:
    """The method called `name`, or the sum of several: "cakd+logits".

    Args:
      name: one of METHODS, or several joined by "+".
      options: for each method the options that differ from its defaults.

    Raises:
      UserError: unknown method or option, or a value of the wrong type.
    """
    parts = tuple((part, _create(part, options.get(part, {}))) for part in name.split("+"))
    if len(parts) == 1:
        return parts[0][1]
    if len({part for part, _ in parts}) < len(parts):
        raise UserError(f"method {name!r} names a method twice; name each once.")
    return Sum(
        multi_view=any(method.multi_view for _, method in parts),
        label_weight=min(method.label_weight for _, method in parts),
        parts=parts,
    )


def check_pair(method: Method, teacher_out: Outputs, student_out: Outputs) -> None:
    """Checks that the method supports this pair; the error names methods that do.

    Args:
      method: with its options.
      teacher_out: the teacher's outputs; shapes suffice.
      student_out: the student's outputs; shapes suffice.

    Raises:
      UserError: the pair is not supported, or an option has an invalid value.
    """
    try:
        method.check(teacher_out, student_out)
    except PairError as error:
        *most, last = (name for name in METHODS if _takes(METHODS[name], teacher_out, student_out))
        raise UserError(f"{error}; for this pair take {', '.join(most)} or {last}.") from None


def _takes(method: Method, teacher_out: Outputs, student_out: Outputs) -> bool:
    try:
        method.check(teacher_out, student_out)
    except UserError:
        return False
    return method.needs_teacher


def _create(name: str, options: Mapping[str, Any]) -> Method:
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    default = METHODS[name]
    known = {f.name: getattr(default, f.name) for f in dataclasses.fields(default)}
    for option, value in options.items():
        if option not in known:
            raise unknown(f"option of method {name}", option, known)
        if type(value) is not type(known[option]):
            right = type(known[option]).__name__
            raise UserError(f"method.{name}.{option} is {value!r}, but must be of type {right}.")
    return dataclasses.replace(default, **options)
