"""The documentation: what it names exists, and what is generated for the site is complete."""

import importlib
import re
from pathlib import Path

import pytest
import yaml

import xkd_jax
from xkd_jax import config as config_module
from xkd_jax.methods import METHODS
from xkd_jax.validation import validate

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
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

    A script may be named by the end of its path, such as `cli/train.py`. Files that the page itself
    shows are left out.
    """
    text = page.read_text()
    shown = set(re.findall(r'^```python\n"""([\w.]+):', text, re.M))
    code = " ".join(re.findall(r"```.*?```|^    .*?$|`[^`]+`", text, re.S | re.M))
    words = re.findall(r"(?<![\w./{-])[\w./-]+[\w/](?![\w*{])", code)
    known = tuple(f"{folder}/" for folder in FOLDERS)
    found = {word for word in words if word.startswith(known) or word.endswith((".py", ".sh"))}
    return found - shown


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


def check_training(commands: list[tuple[str, str]]) -> None:
    """Validates recipes with the options that follow them."""
    for recipe, options in commands:
        name, _, variant = recipe.partition(":")
        config = importlib.import_module(f"xkd_jax.configs.{name}").get_config(variant)
        for name, value in re.findall(r"--config\.([\w.]+)=(\S+)", options):
            value = int(value) if value.isdecimal() else value
            assert config_module.has_field(config, name)
            with config.unlocked():  # the arguments of networks are open
                config.update_from_flattened_dict({name: value})
        validate(config)


def test_the_commands_of_no_labels_are_valid_configs():
    page = (ROOT / "docs" / "no_labels.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"python -m xkd_jax\.main --config configs/(\w+)\.py (.*)", page)
    assert [recipe for recipe, _ in commands] == ["probe_teacher", "folder", "folder", "folder"]
    check_training(commands)


COMMANDS = {
    "photos_to_onnx.md": ["convert", "train", "train", "evaluate", "predict", "export"],
    "detection.md": [
        "train",
        "train",
        "evaluate",
        "predict",
        "export",
        "predict",
        "train",
        "train",
        "train",
    ],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_commands_of_a_page_are_valid(name, capsys):
    page = (ROOT / "docs" / name).read_text().replace("\\\n", " ")
    commands = re.findall(r"^xkd-jax (\w+) (.*)", page, re.M)
    assert [verb for verb, _ in commands] == COMMANDS[name]
    training = [rest for verb, rest in commands if verb == "train"]
    check_training([re.fullmatch(r"--config (\S+) (.*)", rest).groups() for rest in training])
    for verb, rest in (command for command in commands if command[0] != "train"):
        with pytest.raises(SystemExit, match="0"):
            importlib.import_module(f"xkd_jax.cli.{verb}").main(["--help"])
        known = set(re.findall(r"--\w+", capsys.readouterr().out))
        assert set(re.findall(r"--\w+", rest)) <= known


@pytest.fixture
def reference(monkeypatch):
    """Imports a module of scripts/, as MkDocs does."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_lists_are_indented_for_the_site(page):
    """Python-Markdown ends a list at a paragraph that is indented by less than four spaces."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    assert not re.findall(r"\n\n {1,3}\S.*", text)


def test_every_field_is_in_the_reference(reference):
    text = reference("docs_reference").config_fields()
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.*) \|$", text, re.M))
    names = {name for name, _ in config_module.fields(config_module.default_config())}
    options = {name for name in names if name.startswith("method.") and name != "method.name"}
    assert rows.keys() == names - options | {"student.args", "teacher.args"}
    assert rows["log_every"] == (
        "`50` | Steps from one line of metrics.jsonl to the next. At least 1."
    )
    assert rows["mesh.student"].endswith('One of `"replicated"`, `"fsdp"`.')
    assert rows["optimizer.clip_norm"].startswith("`0.0` | Maximum gradient norm")
    # A comment of two lines above the field.
    assert rows["teacher.weights"].endswith('"packaged:NAME"; or "random", as a control.')


def test_every_option_is_in_the_reference(reference):
    sections = reference("docs_reference").method_options().split("## `")[1:]
    assert [section.split("`")[0] for section in sections] == list(METHODS)
    for section, method in zip(sections, METHODS.values(), strict=True):
        rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", section, re.M)
        assert rows == [(name, repr(value)) for name, value in vars(method).items()]


def test_errors_are_read_from_the_code(reference):
    source = """
ADVICE = "take another"
def f(path, size, n):
    reason = f"it has {n} parts" if n else ADVICE
    raise UserError(f"{path} can't be read ({reason}); {ADVICE}.")
def g(size, kind):
    if size.x:
        raise errors.UserError(f"size is {size.x!r}, but must be at least " f"{max(1, 2)}_.")
    raise errors.unknown("kind of thing", kind, ())
def h(error):
    raise UserError(f"cell: {error}")
"""
    errors = reference("docs_errors")
    assert set(errors.sentences(source)) == {
        "<var>path</var> can't be read (it has <var>n</var> parts); take another.",
        "size is <var>x</var>, but must be at least …\\_.",
        "unknown kind of thing …; did you mean …?",
    }
    text = errors.errors()
    assert "- no output file is given; **add --out FILE or --to\\_timm FILE.**" in text
    assert (
        text.index("## Config\n") < text.index("label\\_smoothing is <var>") < text.index("## Data")
    )


def test_every_method_has_a_formula():
    text = (ROOT / "docs" / "methods.md").read_text()
    formulas = text[text.index("## Formulas") : text.index("## Which networks")]
    missing = {name for name in METHODS if f"- **`{name}`**:" not in formulas}
    assert missing == {"cakd_release"}  # which has a page with cakd


def test_the_citation_is_that_of_the_readme():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == xkd_jax.__version__
    paper = citation["preferred-citation"]
    names = (f"{a['family-names']}, {a['given-names']}" for a in paper["authors"])
    bibtex = (ROOT / "README.md").read_text()
    assert f"{{{' and '.join(names)}}}" in bibtex
    for value in (paper["title"], str(paper["year"]), f"{paper['start']}-{paper['end']}"):
        assert f"{{{value}}}" in bibtex
