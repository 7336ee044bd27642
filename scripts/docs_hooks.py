"""MkDocs hooks: root pages, links to sources, generated references and formulas of the site.

The links in the Markdown files are those of the repository. A source file that a page links to
becomes a page of the site, which therefore needs no address of the repository.
"""

import html
import posixpath
import re
from pathlib import Path

import docs_reference
from latex2mathml.converter import convert  # pyright: ignore[reportMissingImports]
from mkdocs.structure.files import File  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).parents[1]
ROOT_PAGES = {  # pages from outside docs/, and their places in the site
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
_LANGUAGES = {".py": "python", ".sh": "bash"}
_LINK = re.compile(r"\]\(([^)\s#:]+)(#[^)\s]*)?\)")
_FORMULA = re.compile(r'<(?:span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\w+>', re.S)


def on_config(config):
    """Appends the pages of docs/ that the nav lacks to it, in a section of their own."""
    docs = Path(config.docs_dir)
    pages = sorted(path.relative_to(docs).as_posix() for path in docs.rglob("*.md"))
    more = [page for page in pages if f"'{page}'" not in str(config.nav)]
    if more:
        config.nav.append({"More": more})


def on_files(files, config):
    """Adds the root pages, and a page for each source file or folder that is linked."""
    for path, uri in ROOT_PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / path).read_text()))
    for origin in [_origin(file.src_uri) for file in files.documentation_pages()]:
        for target, _ in _LINK.findall((ROOT / origin).read_text()):
            path = _resolve(target, origin)
            if _site_uri(path).startswith("source/"):
                _add_source(path, files, config)


def on_page_markdown(markdown, page, config, files):
    """Inserts generated references, and turns the repository's links into the site's."""
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return markdown

    def rewrite(link):
        target = _site_uri(_resolve(link[1], _origin(uri)))
        # MkDocs reports links that lead nowhere.
        path = posixpath.relpath(target, posixpath.dirname(uri)) if target else link[1]
        return f"]({path}{link[2] or ''})"

    return docs_reference.fill(_LINK.sub(rewrite, markdown))


def on_page_content(html_text, page, config, files):
    """Turns formulas into MathML, which browsers show without scripts."""
    return _FORMULA.sub(lambda match: _mathml(html.unescape(match[1])), html_text)


def _mathml(formula):
    mathml = convert(formula)
    if "\\" in mathml:
        raise ValueError(f"{formula} has a command that can't be converted to MathML")
    return mathml


def _origin(uri):
    """The path in the repository of a page of the site."""
    roots = {place: path for path, place in ROOT_PAGES.items()}
    return roots.get(uri, f"docs/{uri}")


def _resolve(target, origin):
    """The path in the repository that the file `origin` links to as `target`."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))


def _site_uri(path):
    """The place in the site of a file or folder of the repository; "" if it doesn't exist."""
    if path in ROOT_PAGES:
        return ROOT_PAGES[path]
    full = ROOT / path
    if path.startswith("docs/") and full.is_file():
        return path.removeprefix("docs/")
    if full.is_dir():
        return f"source/{path}/index.md"
    return f"source/{path}.md" if full.is_file() else ""


def _add_source(path, files, config):
    uri, full = _site_uri(path), ROOT / path
    if files.get_file_from_path(uri):
        return
    if full.is_dir():
        names = sorted(child.name for child in full.iterdir() if child.is_file())
        body = "\n".join(f"- [{name}]({name}.md)" for name in names)
        for name in names:
            _add_source(f"{path}/{name}", files, config)
    else:
        language = _LANGUAGES.get(full.suffix, "text")
        body = f"````{language}\n{full.read_text()}\n````"
    header = f"---\nsearch: {{exclude: true}}\n---\n\n# `{path}`\n\n"
    files.append(File.generated(config, uri, content=header + body))
