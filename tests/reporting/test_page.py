"""The HTML page of a report: self-contained, and it renders."""

import base64
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from tests.reporting.folders import write_run
from tests.reporting.test_table_report import SCORES, write_table
from xkd_jax.reporting import report, table_report
from xkd_jax.reporting.document import Items, Paragraph, Table, drop_empty, write_document
from xkd_jax.reporting.pictures import Drawing, plot_confusion, write

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class Tags(HTMLParser):
    """Counts tags, and checks that they are closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.count, self.attributes = [], {}, []

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.attributes += attrs
        if tag not in ("meta", "img"):  # void elements
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parse(page):
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    return tags


def write_comparison(folder):
    for name, top1 in {"none": 0.5, "cakd": 0.6}.items():
        write_run(folder / name, top1, (0.25, 0.5), method__name=name)


def assert_self_contained(page):
    tags = parse(page)
    assert not {"script", "link", "iframe", "object"} & tags.count.keys()
    assert all(value.startswith("data:") for name, value in tags.attributes if name == "src")
    # References within the page only.
    targets = [value for name, value in tags.attributes if name in ("href", "xlink:href")]
    assert all(target.startswith("#") for target in targets)
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?(.)", page))
    assert not re.search("https?:|@import", page)
    return tags


def test_the_page_of_a_table_is_self_contained(tmp_path):
    write_table(tmp_path, SCORES)
    table_report.write(tmp_path)
    page = (tmp_path / "report.html").read_text()
    tags = assert_self_contained(page)
    assert (tags.count["table"], tags.count["svg"]) == (3, 2)
    assert page.count("* p &lt; 0.05") == 1
    for file in ("gains.png", "curves.png"):
        assert (tmp_path / file).read_bytes().startswith(b"\x89PNG")
        assert f"({file})" in (tmp_path / "report.md").read_text()


def test_the_page_of_a_comparison_and_of_a_run_is_self_contained(tmp_path):
    write_comparison(tmp_path)
    for folder, rows in ((tmp_path, 3), (tmp_path / "cakd", 2)):
        text = report.write(folder)
        assert f"page: {folder / 'report.html'}" in text
        page = (folder / "report.html").read_text()
        tags = assert_self_contained(page)
        assert (tags.count["table"], tags.count["svg"]) == (2, 1)
        scores = page.split("</table>")[0]
        assert scores.count("<tr") == rows + 1
        assert "<td>87.50</td>" in scores


def test_the_page_contains_the_pictures_of_its_runs(tmp_path):
    write_comparison(tmp_path)
    folder = tmp_path / "cakd" / "pictures"
    drawing = Drawing(plot_confusion(np.eye(3, dtype=int), ("a", "b", "c")), "<b> of 3 images")
    write({"confusion": drawing}, folder)
    (tmp_path / "none" / "pictures").mkdir()
    (tmp_path / "none" / "pictures" / "captions.json").write_text("{")
    text = report.write(tmp_path)
    page = (tmp_path / "report.html").read_text()
    tags = assert_self_contained(page)
    assert (tags.count["img"], tags.count["figcaption"]) == (1, 1)
    assert base64.b64encode((folder / "confusion.png").read_bytes()).decode() in page
    assert "<figcaption>&lt;b&gt; of 3 images</figcaption>" in page
    assert "<h2>Pictures of cakd</h2>" in page
    markdown = (tmp_path / "report.md").read_text()
    assert "![confusion](cakd/pictures/confusion.png)\n\n<b> of 3 images\n" in markdown
    assert f"{tmp_path / 'none' / 'pictures' / 'captions.json'} is damaged" in text


def test_text_is_escaped(tmp_path):
    nasty = '<b> & "c"'
    blocks = [Paragraph(nasty), Items([nasty]), Table([[nasty, "a"], ["b", nasty]], best=0)]
    write_document(tmp_path, nasty, blocks)
    page = (tmp_path / "report.html").read_text()
    assert "b" not in parse(page).count
    assert page.count("&lt;b&gt; &amp; &quot;c&quot;") == 6


def test_empty_columns_are_dropped():
    assert drop_empty([["", "a", "b"], ["x", "", "1"], ["y", "", ""]]) == [
        ["", "b"],
        ["x", "1"],
        ["y", ""],
    ]


MEASURE = """
<script>
addEventListener("load", () => {
  const boxes = [...document.querySelectorAll("table, svg")].map(element => {
    const box = element.getBoundingClientRect();
    return `${element.tagName.toLowerCase()}:${Math.round(box.width)}x${Math.round(box.height)}`;
  });
  document.body.dataset.boxes = boxes.join(" ");
});
</script>
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["table", "comparison"])
def test_the_page_renders_in_a_browser(tmp_path, kind):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    if kind == "table":
        write_table(tmp_path, SCORES)
        table_report.write(tmp_path)
    else:
        write_comparison(tmp_path)
        report.write(tmp_path)
    # A copy that also tells how large the browser has made everything.
    page = (tmp_path / "report.html").read_text()
    (tmp_path / "measured.html").write_text(page.replace("</body>", f"{MEASURE}</body>"))
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,1600",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{tmp_path}/measured.html"],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    boxes = re.search(r'data-boxes="([^"]*)"', done.stdout)[1].split()
    assert sorted(box.split(":")[0] for box in boxes) == (
        ["svg"] * 2 + ["table"] * 3 if kind == "table" else ["svg"] + ["table"] * 2
    )
    for box in boxes:
        width, height = map(int, box.split(":")[1].split("x"))
        assert 100 < width <= 1200
        assert height > 50
