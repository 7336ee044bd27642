"""The distillation methods, by name. A new one is one file here and one line in METHODS."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from xkd_jax.errors import UserError, unknown
from xkd_jax.methods.base import Method
from xkd_jax.methods.cakd import CAKD
from xkd_jax.methods.cakd_release import CAKDRelease
from xkd_jax.methods.combine import Sum
from xkd_jax.methods.logits import Logits

METHODS: dict[str, Method] = {
    "none": Method(),
    "logits": Logits(),
    "cakd": CAKD(),
    "cakd_release": CAKDRelease(),
}


def create_method(name: str, options: Mapping[str, Mapping[str, Any]]) -> Method:
    """The method called `name`, or the sum of several: "cakd+logits".

    Args:
      name: one of METHODS, or several joined by "+".
      options: for each method the options that differ from its defaults.

    Raises:
      UserError: no such method, no such option, or a value of the wrong type.
    """
    parts = tuple((part, _create(part, options.get(part, {}))) for part in name.split("+"))
    if len(parts) == 1:
        return parts[0][1]
    if len({part for part, _ in parts}) < len(parts):
        raise UserError(f"method {name!r} names a method twice; name each once.")
    return Sum(multi_view=any(method.multi_view for _, method in parts), parts=parts)


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
