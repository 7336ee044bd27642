"""Every sentence that the library raises for a user's mistake, from the code, grouped by area."""

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "xkd_jax"
AREAS = {  # by the first part of a module's path; other folders have their own name
    "config.py": "Config",
    "validation.py": "Config",
    "optim.py": "Config",
    "schedules.py": "Config",
    "tasks": "Training",
    "cli": "Commands and run folders",
    "inputs.py": "Data",
    "augment": "Augmentation",
    "models": "Networks",
    "model.py": "Weights",
    "weights.py": "Weights",
    "convert": "Conversion",
    "teacher": "Teacher and cache",
    "distributed": "Several processes",
    "probing": "Probes",
    "reporting": "Reports",
}
_RAISED = ("UserError", "PairError", "DamagedImage", "SizesDiffer", "Diverged", "too_large")
_LEFT_OUT = ("configs", "errors.py")
_CURE = re.compile(r"(?<=; )|(?<=,) (?=but must )| (?=must )")


def errors() -> str:
    """The sentences as Markdown: a section for each area, with what would be right in bold."""
    areas: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        first = path.relative_to(PACKAGE).parts[0]
        if first not in _LEFT_OUT:
            default = "Training" if first.endswith(".py") else first.capitalize()
            found = areas.setdefault(AREAS.get(first, default), set())
            found.update(sentences(path.read_text()))
    return "\n\n".join(
        f"## {area}\n\n" + "\n".join(f"- {_emphasise(text)}" for text in sorted(found, key=_words))
        for area, found in sorted(areas.items())
        if found
    )


def sentences(source: str) -> Iterator[str]:
    """The sentences of a module's errors, as Markdown.

    A value that is filled in is a <var> with its name in the code, or an ellipsis. Errors without
    words of their own, which pass another one on, are left out.
    """
    tree = ast.parse(source)
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        names = _texts(tree.body) | _texts(ast.walk(function))
        for node in ast.walk(function):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            called = ast.unparse(node.func).rpartition(".")[2]
            text = _markdown(node.args[0], names)
            if called == "unknown":
                yield f"unknown {text} …; did you mean …?"
            elif called in _RAISED and len(_words(text).split()) > 2:
                yield text


def escape(text: str) -> str:
    """Text as Markdown in which only code spans are special."""

    def plain(part: str) -> str:
        return re.sub(r"([*_|\\$\[])", r"\\\1", part).replace("<", "&lt;")

    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part.replace("|", "\\|") if part.startswith("`") else plain(part) for part in parts
    )


def _texts(statements: Iterable[ast.AST]) -> dict[str, ast.expr]:
    """The names that these statements assign a text or a number, once each."""
    found: dict[str, list[ast.expr]] = {}
    for node in statements:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, []).append(node.value)
    kinds = (ast.Constant, ast.JoinedStr, ast.IfExp)
    return {name: v[0] for name, v in found.items() if len(v) == 1 and isinstance(v[0], kinds)}


def _markdown(node: ast.expr, names: dict[str, ast.expr]) -> str:
    """An expression that makes a string; of alternatives, the first."""
    match node:
        case ast.Constant(value=value):
            return escape(re.sub(r"\s+", " ", str(value)))
        case ast.JoinedStr(values=values):
            return "".join(_markdown(value, names) for value in values)
        case ast.FormattedValue(value=value):
            return _markdown(value, names)
        case ast.IfExp(body=body, orelse=orelse):
            return _markdown(body, names) or _markdown(orelse, names)
        case ast.BoolOp(values=[first, *_]):
            return _markdown(first, names)
        case ast.Name(id=name) if name in names:
            return _markdown(names[name], {k: v for k, v in names.items() if k != name})
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return f"<var>{name.strip('_').lower()}</var>"
    return "…"


def _words(text: str) -> str:
    """The text without what is filled in: to sort by, and to tell whether there are any words."""
    return re.sub(r"<var>.*?</var>|[^a-z ]", "", text.lower()).strip()


def _emphasise(text: str) -> str:
    wrong, *cure = _CURE.split(text, maxsplit=1)
    if not cure:
        return text
    return f"{wrong.rstrip()} **{cure[0].strip()}**"
