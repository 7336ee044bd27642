"""The documentation: the files, folders and functions that it names exist."""

import importlib
import re
from pathlib import Path

import pytest

from xkd_jax.config import validate

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
FOLDERS = ("benchmarks", "configs", "docs", "launch", "scripts", "tests", "xkd_jax")
SOURCES = [
    path.relative_to(ROOT).as_posix()
    for folder in FOLDERS
    for suffix in ("py", "sh")
    for path in ROOT.glob(f"{folder}/**/*.{suffix}")
]


def links(page: Path) -> set[str]:
    """The targets of relative links, without anchors."""
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    return {target.split("#")[0] for target in targets if not re.match(r"\w+:|#", target)}


def paths(page: Path) -> set[str]:
    """Paths in code spans and blocks: all that begin with a folder of the repository, and scripts.

    A script may be named by the end of its path, such as `cli/train.py`.
    """
    code = " ".join(re.findall(r"```.*?```|^    .*?$|`[^`]+`", page.read_text(), re.S | re.M))
    words = re.findall(r"(?<![\w./{-])[\w./-]+[\w/](?![\w*{])", code)
    known = tuple(f"{folder}/" for folder in FOLDERS)
    return {word for word in words if word.startswith(known) or word.endswith((".py", ".sh"))}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_paths_exist(page):
    missing = {target for target in links(page) if not (page.parent / target).exists()}
    for path in paths(page):
        is_part = any(f"/{source}".endswith(f"/{path}") for source in SOURCES)
        if not is_part and not (ROOT / path).exists():
            missing.add(path)
    assert not missing


def test_functions_named_after_a_link_are_in_that_file():
    """As in docs/method.md: a link to a module, then `function`, `Class.method`, ..."""
    found = 0
    for page in PAGES:
        named = re.findall(r"\]\(([^)\s]+\.py)\)((?:,? `[\w.]+`)+)", page.read_text())
        for target, names in named:
            source = (page.parent / target).read_text()
            for name in re.findall(r"[\w.]+", names):
                definition = rf"^\s*(?:def|class) {name.split('.')[-1]}\b"
                assert re.search(definition, source, re.M), f"{page.name}: {name} in {target}"
                found += 1
    assert found


def test_the_commands_of_no_labels_are_valid_configs():
    page = (ROOT / "docs" / "no_labels.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"python -m xkd_jax\.main --config configs/(\w+)\.py (.*)", page)
    assert [recipe for recipe, _ in commands] == ["folder", "folder", "probe_teacher"]
    for recipe, options in commands:
        config = importlib.import_module(f"xkd_jax.configs.{recipe}").get_config()
        for name, value in re.findall(r"--config\.([\w.]+)=(\S+)", options):
            value = int(value) if value.isdecimal() else value
            config.update_from_flattened_dict({name: value})
        validate(config)
