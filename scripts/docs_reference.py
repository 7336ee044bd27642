"""References of the documentation that are generated from the code: fields, options, errors.

A page says where: `<!-- generated: NAME -->`, with NAME a key of `REFERENCES`.
"""

import ast
import dataclasses
import inspect
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from typing import Any

import docs_errors

from xkd_jax import config as config_module
from xkd_jax import validation
from xkd_jax.augment.multiview import MultiView
from xkd_jax.augment.policies import Augment
from xkd_jax.methods import METHODS
from xkd_jax.optim import OptimizerOptions
from xkd_jax.schedules import ScheduleOptions

# Sections of the config that are the fields of a dataclass, whose docstring describes them.
_DATACLASSES = {
    "augment": Augment,
    "views": MultiView,
    "optimizer": OptimizerOptions,
    "schedule": ScheduleOptions,
    "method_optimizer": OptimizerOptions,
    "adversary_optimizer": OptimizerOptions,
}
_MARKER = re.compile(r"<!-- generated: (\w+) -->")


def fill(markdown: str) -> str:
    """Replaces each marker with its reference."""
    return _MARKER.sub(lambda marker: REFERENCES[marker[1]](), markdown)


def config_fields() -> str:
    """Every field of the config except the methods' options: a table for each section.

    Raises:
      ValueError: a field has no comment in xkd_jax/config.py.
    """
    meanings = dict(_comments())
    for section, options in _DATACLASSES.items():
        meanings |= {f"{section}.{name}": text for name, text in attributes(options).items()}
    values = dict(config_module.fields(config_module.default_config()))
    values |= {"student.args": {}, "teacher.args": {}}  # which have no fields of their own
    wanted = [name for name in values if name == "method.name" or not name.startswith("method.")]
    order = list(meanings)
    sections: dict[str, list[str]] = {}
    for name in sorted(wanted, key=order.index):
        row = _row(name, values[name], meanings[name] + _limits(name))
        sections.setdefault(name.rpartition(".")[0], []).append(row)
    titles = {section: f"## `{section}`" if section else "## The run" for section in sections}
    return "\n\n".join(
        f"{titles[section]}\n\n{_table('field', rows)}" for section, rows in sections.items()
    )


def method_options() -> str:
    """Every option of every method: a table for each of them.

    Raises:
      KeyError: an option is not described in the docstring of its class.
    """
    parts = []
    for name, method in METHODS.items():
        meanings = attributes(type(method))
        rows = []
        for field in dataclasses.fields(method):
            meaning = meanings[field.name]
            if field.name in method.imagenet:
                meaning += f" ImageNet: `{method.imagenet[field.name]!r}`."
            rows.append(_row(field.name, getattr(method, field.name), meaning))
        summary = docs_errors.escape((inspect.getdoc(type(method)) or "").partition("\n")[0])
        parts.append(f"## `{name}`\n\n{summary}\n\n{_table('option', rows)}")
    return "\n\n".join(parts)


def attributes(options: type) -> dict[str, str]:
    """The descriptions of a dataclass's fields by name, those of its base classes included."""
    found: dict[str, str] = {}
    for parent in options.__mro__[:-1]:
        _, _, listed = (inspect.getdoc(parent) or "").partition("Attributes:\n")
        for name, text in re.findall(r"^  (\w+): (.*(?:\n    .*)*)", listed, re.M):
            found.setdefault(name, _sentence(" ".join(text.split())))
    return found


def _comments() -> Iterator[tuple[str, str]]:
    """Each field that xkd_jax/config.py sets by itself, with its comment."""
    source = inspect.getsource(config_module)
    comments, alone = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ")
            if token.line.strip().startswith("#"):
                alone.add(token.start[0])
    functions = {f.name: f for f in ast.parse(source).body if isinstance(f, ast.FunctionDef)}
    for name, line in _definitions(functions["default_config"], functions):
        above = line - 1
        while above in alone:
            above -= 1
        text = [comments[row] for row in range(above + 1, line + 1) if row in comments]
        if text:
            yield name, _sentence(" ".join(text))


def _definitions(function: Any, functions: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """The fields that a function of config.py sets or returns, each with its line."""
    local: dict[str, ast.expr] = {}

    def visit(node: Any, name: str, line: int) -> Iterator[tuple[str, int]]:
        if isinstance(node, ast.Name) and node.id in local:
            node = local[node.id]
        if isinstance(node, ast.Call) and ast.unparse(node.func) in functions:
            inner = _definitions(functions[ast.unparse(node.func)], functions)
            yield from ((".".join(filter(None, (name, field))), row) for field, row in inner)
        elif isinstance(node, ast.Call) and node.args and ast.unparse(node.func) == "ConfigDict":
            yield from visit(node.args[0], name, line)
        elif isinstance(node, ast.Dict) and node.keys:
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant):
                    field = ".".join(filter(None, (name, str(key.value))))
                    yield from visit(value, field, key.lineno)
        elif name:
            yield name, line

    for statement in function.body:
        if isinstance(statement, ast.Assign):
            target = ast.unparse(statement.targets[0])
            if target.startswith("config."):
                yield from visit(statement.value, target.removeprefix("config."), statement.lineno)
            else:
                local[target] = statement.value
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            if statement.value.args:  # config.update(...)
                yield from visit(statement.value.args[0], "", statement.lineno)
        elif isinstance(statement, ast.Return) and statement.value:
            yield from visit(statement.value, "", statement.lineno)


def _limits(name: str) -> str:
    if name in validation.CHOICES:
        known = (f'`"{choice}"`' for choice in validation.CHOICES[name])
        return f" One of {', '.join(known)}."
    if name in validation.AT_LEAST:
        return f" At least {validation.AT_LEAST[name]}."
    return ""


def _row(name: str, default: Any, meaning: str) -> str:
    return f"| `{name}` | `{default!r}` | {meaning} |"


def _table(kind: str, rows: list[str]) -> str:
    return "\n".join([f"| {kind} | default | meaning |", "|---|---|---|", *rows])


def _sentence(text: str) -> str:
    """With a capital letter, unless it begins with a name, and a full stop."""
    if re.match(r"[a-z]+\b(?![_(.])", text):
        text = text[0].upper() + text[1:]
    return docs_errors.escape(text if text.endswith(".") else f"{text}.")


REFERENCES: dict[str, Callable[[], str]] = {
    "config_fields": config_fields,
    "method_options": method_options,
    "errors": docs_errors.errors,
}
