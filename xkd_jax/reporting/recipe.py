"""Finds runs that were trained with another recipe than the rest of their table."""

import collections
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xkd_jax.errors import UserError
from xkd_jax.reporting.files import CONFIG, DATA, read_json

# Fields that may change when a run resumes, because they don't affect its results.
FREE = (
    "data.dir",
    "monitor.dir",
    "teacher.cache",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "checkpoint_dir",
    "steps_per_dispatch",
    "pictures",
)
_SHOWN = 3  # differences that are named
_DIGEST = "the digest of "
_MISSING = object()


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a run was trained with, and what its table sets.

    Attributes:
      found: every field of the run's config, "a.b.c", and the digests of its images.
      fields: the values that the table sets for the run.
    """

    found: Mapping[str, Any]
    fields: Mapping[str, Any]


def read_recipe(folder: Path, fields: Mapping[str, Any]) -> Recipe:
    """The recipe of the run in `folder`; without a config.json it has no fields.

    Args:
      folder: the run's folder.
      fields: the values that the table sets for the run.

    Raises:
      UserError: config.json or data.json is damaged.
    """
    found: dict[str, Any] = {}
    if (folder / CONFIG).exists():
        found = _flatten(_read(folder / CONFIG))
        if (folder / DATA).exists():
            found |= _images(found, _read(folder / DATA))
    return Recipe(found, _flatten(fields))


def _read(path: Path) -> dict[str, Any]:
    contents = read_json(path)
    if not isinstance(contents, dict):
        raise UserError(f"{path} is damaged: it has no fields; restore it.")
    return contents


def find_differences(recipes: Sequence[Recipe]) -> list[str]:
    """For each run, how its recipe differs from what its table and most other runs have.

    A field that the table doesn't set has the value of most of the runs for which the table doesn't
    set it; if two values are equally frequent, that of the run that comes first. A field that an
    older version of xkd_jax didn't have yet had what is its default now.

    Args:
      recipes: the recipes of all runs of a table.

    Returns:
      A phrase for each run; "" if its recipe is the same.
    """
    usual = {}
    for name in sorted({name for recipe in recipes for name in recipe.found.keys() - set(FREE)}):
        others = [recipe for recipe in recipes if name not in recipe.fields]
        if any(name in recipe.found for recipe in others):
            values = [_value(recipe, name) for recipe in others]
            # As text, because lists can't be counted.
            texts = [json.dumps(value) for value in values if value is not _MISSING]
            usual[name] = json.loads(collections.Counter(texts).most_common(1)[0][0])
    return [_describe(recipe, usual) for recipe in recipes]


def _describe(recipe: Recipe, usual: Mapping[str, Any]) -> str:
    phrases = []
    if not recipe.found:
        return ""
    wanted = {name: (value, "most runs") for name, value in usual.items()}
    wanted |= {name: (value, "the table") for name, value in recipe.fields.items()}
    for name, (value, where) in wanted.items():
        found = _value(recipe, name)
        if found is not _MISSING and found != value and name not in FREE:
            phrases.append(f"{name} is {found!r}, but {value!r} in {where}")
    more = f" (and {len(phrases) - _SHOWN} more)" if len(phrases) > _SHOWN else ""
    return "; ".join(phrases[:_SHOWN]) + more


def _value(recipe: Recipe, name: str) -> Any:
    """A field's value in a run; its default if it is newer than the run."""
    if name in recipe.found:
        return recipe.found[name]
    if not recipe.found or name.startswith(_DIGEST):  # images are those of another split
        return _MISSING
    first, _, rest = name.partition(".")
    methods = recipe.found.get("method.name", "").split("+")
    if first == "method" and rest.split(".")[0] not in methods:
        return _MISSING  # options of other methods aren't written
    return _defaults().get(name)


def _images(config: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """The digests of a run's images, by data set and split."""
    found = {}
    for part, split in data.items():
        name = f"{_DIGEST}{config.get('data.name')} {config.get(f'data.{part}')}"
        if isinstance(split, dict) and "digest" in split:
            found[name] = split["digest"]
    return found


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by their names, "a.b.c"."""
    flat = {}
    for name, value in tree.items():
        inner = _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else None
        flat |= {f"{prefix}{name}": value} if inner is None else inner
    return flat


@functools.cache
def _defaults() -> dict[str, Any]:
    # Imports JAX, which no other part of a report needs.
    from xkd_jax.config import default_config

    return _flatten(json.loads(json.dumps(default_config().to_dict())))
