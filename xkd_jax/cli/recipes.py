"""Recipes by name: --config takes a file, or the name of one that is installed with xkd_jax."""

from pathlib import Path

from xkd_jax.errors import unknown

FOLDER = Path(__file__).parents[1] / "configs"
_HELPERS = ("__init__", "common")  # modules there that are not recipes


def names() -> list[str]:
    """The installed recipes: names such as "quickstart" and "tables/table1", sorted."""
    paths = (path for path in FOLDER.rglob("*.py") if path.stem not in _HELPERS)
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in paths)


def locate(recipe: str) -> str:
    """The path of a recipe, with the variant that follows a colon if there is one.

    Args:
      recipe: as --config takes it: a path, or "quickstart", "quickstart.py:smoke" or
        "configs/tables/table1.py". An existing file takes precedence over an installed recipe.

    Raises:
      UserError: there is neither such a file nor such a recipe.
    """
    path, colon, variant = recipe.partition(":")
    if Path(path).is_file():
        return recipe
    name = path.removeprefix("configs/").removesuffix(".py")
    if name not in names():
        raise unknown("config file or recipe", path, names())
    return f"{FOLDER / name}.py{colon}{variant}"
