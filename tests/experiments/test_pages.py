"""Pages of the studies: one HTML file that needs nothing else, Markdown beside it."""

import base64
import html.parser

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.markdown import Markdown

from experiments.errors import MetricsError
from experiments.studies import pages
from experiments.studies.pages import Page, Plot, Section, Table

NASTY = '<script>alert("1")</script> & a|b `c` *d* _e_ [f](g) \\ λ'
MACHINE = {
    "date": "2026-11-22",
    "processor": "some",
    "load": [1.5, 2],
    "jax": "0.10.2",
    "kfac_jax": None,
}


class Reader(html.parser.HTMLParser):
    """Collects tags with their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    def attributes(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def save_plot(path):
    figure = Figure(figsize=(1, 1))
    figure.subplots().plot([1, 2])
    FigureCanvasAgg(figure).print_png(path)
    return path


@pytest.fixture
def saved(tmp_path):
    """A page with everything: its HTML, its Markdown, its plot."""
    plot = Plot(save_plot(tmp_path / "a plot.png"), f"Loss {NASTY}")
    table = Table(("name", "loss"), ((NASTY, "0.25"), ("none", None)), "Of <losses>")
    sections = (Section("Result & more", (f"- {NASTY}", table, plot)),)
    config = {NASTY: 1e-3, "kl_clip": None, "blocks": [1, 2], "net": {"width": 4}}
    page = Page(f"Study {NASTY}", sections, config, MACHINE, ("abc1234, modified",))
    paths = pages.save_page(page, tmp_path)
    assert [path.name for path in paths] == ["page.html", "page.md"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a plot.png",
        "page.html",
        "page.md",
    ]
    html_text, markdown = (path.read_text(encoding="utf-8") for path in paths)
    return html_text, markdown, plot


def test_everything_is_escaped(saved):
    text, _, _ = saved
    reader = Reader(text)
    assert reader.open == []
    assert "<script" not in text
    known = "html head meta title style body h1 h2 p figure img figcaption"
    known += " div table caption thead tbody tr th td"
    assert {name for name, _ in reader.tags} <= set(known.split())
    shown = reader.texts
    for wanted in (
        f"Study {NASTY}",
        "Result & more",
        f"- {NASTY}",
        NASTY,
        "Of <losses>",
    ):
        assert wanted in shown
    assert reader.attributes("img")[0]["alt"] == f"Loss {NASTY}"


def test_the_file_needs_nothing_else(saved):
    text, _, plot = saved
    reader = Reader(text)
    for _, attributes in reader.tags:
        assert not attributes.keys() & {"href", "srcset", "onload", "onerror", "style"}
    sources = [a["src"] for _, a in reader.tags if "src" in a]
    assert len(sources) == 1
    start = "data:image/png;base64,"
    assert sources[0].startswith(start)
    content = base64.b64decode(sources[0].removeprefix(start), validate=True)
    assert content == plot.path.read_bytes()
    assert "url(" not in text and "@import" not in text and "http:" not in text
    policy = [a for a in reader.attributes("meta") if "http-equiv" in a]
    assert "default-src 'none'" in policy[0]["content"]
    named = [a["name"] for a in reader.attributes("meta") if "name" in a]
    assert named == ["viewport"]
    assert "prefers-color-scheme: dark" in text


def test_nulls_and_how_it_was_made(saved):
    text, markdown, _ = saved
    shown = Reader(text).texts
    assert "Commit: abc1234, modified." in shown and "Date: 2026-11-22." in shown
    for name, value in (
        ("none", "–"),
        ("kl_clip", "–"),
        ("blocks", "1, 2"),
        ("net", "width = 4"),
        ("load", "1.5, 2"),
        ("jax", "0.10.2"),
        ("kfac_jax", "–"),
    ):
        assert shown[shown.index(name) + 1] == value
        assert f"| {name} | {value} |" in markdown
    assert "None" not in shown and "None" not in markdown


def tokens_of(markdown):
    """The blocks of a Markdown text, as a parser with tables sees them."""
    return Markdown(markdown).parsed


def test_markdown_says_the_same(saved):
    _, markdown, _ = saved
    tokens = tokens_of(markdown)
    kinds = {token.type for token in tokens}
    assert not kinds & {"bullet_list_open", "html_block", "code_block", "fence"}
    shown = [
        "".join(child.content for child in token.children or ())
        for token in tokens
        if token.type == "inline"
    ]
    for wanted in (
        f"Study {NASTY}",
        "Result & more",
        f"- {NASTY}",
        NASTY,
        "Of <losses>",
    ):
        assert wanted in shown
    at = shown.index(NASTY)
    assert shown[at - 2 : at + 4] == ["name", "loss", NASTY, "0.25", "none", "–"]
    images = [
        child
        for token in tokens
        for child in token.children or ()
        if child.type == "image"
    ]
    assert [image.attrs["src"] for image in images] == ["a%20plot.png"]
    # Nothing in the text became a link or was set in another face.
    inner = {child.type for token in tokens for child in token.children or ()}
    assert inner <= {"text", "image", "text_special"}


@pytest.mark.parametrize("start", ["# a", "> a", "1. a", "12) a", "+ a", "- a", "=="])
def test_paragraphs_stay_paragraphs(start):
    tokens = tokens_of(pages.markdown_part(start))
    assert [token.type for token in tokens] == [
        "paragraph_open",
        "inline",
        "paragraph_close",
    ]
    assert "".join(child.content for child in tokens[1].children or ()) == start


def test_old_records_have_no_commit(tmp_path):
    page = Page("Old", (), {}, {}, ())
    html_path, markdown_path = pages.save_page(page, tmp_path / "new", "old")
    assert html_path.name == "old.html"
    for path in (html_path, markdown_path):
        text = path.read_text(encoding="utf-8")
        assert "Commit: not recorded." in text and "Date: not recorded." in text


def test_plots_that_cannot_be_shown(tmp_path):
    def save(path):
        section = Section("Result", ("Text.", Plot(path)))
        pages.save_page(Page("A", (section,), {}, {}, ()), tmp_path / "page")

    with pytest.raises(MetricsError, match=r"missing\.png .*does not exist"):
        save(tmp_path / "page" / "missing.png")
    with pytest.raises(MetricsError, match=r"other\.png is not in the page's folder"):
        save(save_plot(tmp_path / "other.png"))
    wrong = tmp_path / "page" / "wrong.png"
    wrong.write_bytes(b"GIF89a..........")
    with pytest.raises(MetricsError, match=r"wrong\.png is no PNG: it starts with"):
        save(wrong)
    assert not (tmp_path / "page" / "page.html").exists()


def test_a_row_has_a_cell_for_each_column():
    with pytest.raises(ValueError, match="row 2 of the table 'Losses' has 1 cells"):
        Table(("a", "b"), (("1", "2"), ("3",)), "Losses")


def test_numbers_are_to_the_right():
    for text in ("0.25", "-1e-05", "33%", "17 %", "–", "1,200"):
        assert 'class="n"' in pages.html_cell(text), text
    for text in ("adam", "1e-05, 2", "λ = 3"):
        assert 'class="n"' not in pages.html_cell(text), text
