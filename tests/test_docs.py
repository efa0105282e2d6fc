"""The API reference: every public name has a page's section, and docstrings come out as they are meant."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

import resid_surgery as rs

ROOT = Path(__file__).parent.parent
if importlib.util.find_spec("pdoc") is None:
    pytest.skip("pdoc is not installed: pip install 'resid-surgery[docs]'", allow_module_level=True)

# pdoc evaluates annotations, and pandas' Series takes type arguments in its stubs only
pytestmark = pytest.mark.filterwarnings("ignore:Error parsing type annotation pd.Series")


def _builder() -> Any:
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / ".docs" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


docs = _builder()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("docs")
    return {str(path.relative_to(out)): path.read_text(encoding="utf-8") for path in docs.build(out)}


def test_every_public_name_has_a_section_and_a_line_on_the_first_page(pages: dict[str, str]) -> None:
    for room, names in docs.rooms().items():
        text = pages[f"resid_surgery/{room or 'basics'}.html"]
        for name in names:
            assert f'<section id="{name}">' in text, name
            assert f'href="resid_surgery/{room or "basics"}.html#{name}"' in pages["resid_surgery.html"], name
    assert sorted(name for names in docs.rooms().values() for name in names) == rs.__all__


def test_every_link_between_pages_leads_somewhere(pages: dict[str, str]) -> None:
    inner = {name: text for name, text in pages.items() if name.startswith("resid_surgery")}
    for name, text in inner.items():
        for target in re.findall(r'href="([^"]*\.html#[^"]+|#[^"]+)"', text):
            page, _, anchor = target.partition("#")
            at = (Path(name).parent / page).as_posix() if page else name
            at = re.sub(r"[^/]+/\.\./", "", at)
            assert f'id="{anchor}"' in inner[at], (name, target)


def test_the_table_of_errors_is_a_page(pages: dict[str, str]) -> None:
    text = pages["resid_surgery/conditions.html"]
    rows = re.findall(
        r"^\| (?!condition)(.+?) \| .+ \|$", (ROOT / ".docs" / "errors.md").read_text(encoding="utf-8"), re.M
    )
    assert len(rows) > 60
    assert text.count("<tr>") == len(rows) + text.count("<table>") == len(rows) + 6
    assert '<a href="basics.html#SiteError">' in text, "names are linked there too"
    assert 'href="resid_surgery/conditions.html"' in pages["resid_surgery.html"]


def test_pages_ask_nothing_of_the_network(pages: dict[str, str]) -> None:
    for name, text in pages.items():
        if name.endswith(".html"):
            loaded = re.findall(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="(https?:[^"]+)"', text)
            assert not loaded, (name, loaded)


def test_every_argument_is_a_line_of_its_own() -> None:
    text = docs.google(
        """One line.

        Args:
            rec: a recording. layer: one layer, such as
                3 (e.g. the last). kind, norm: as in `scores`.
            **options: more.

        Raises:
            ArgumentError: no such layer. SiteError, PromptError: nor place.

        Source: a paper,
        second line.
        """
    )
    assert text.split("\n")[2:7] == [
        "Args:",
        "    rec: a recording.",
        "    layer: one layer, such as 3 (e.g. the last).",
        "    kind, norm: as in `scores`.",
        "    **options: more.",
    ]
    assert "    ArgumentError: no such layer.\n    SiteError, PromptError: nor place.\n" in text
    assert text.rstrip().endswith("*Source: a paper, second line.*")


def test_examples_are_code() -> None:
    text = docs.google("Does it.\n\nExample:\n    >>> f(1)\n    2\n\nSource: a paper.")
    assert "```python\n>>> f(1)\n2\n```" in text
    assert "*Source: a paper.*" in text


def test_sections_on_one_line_are_sections() -> None:
    assert docs.google("Does it.\n\nReturns: a table.\n") == "Does it.\n\nReturns:\n    a table.\n\n"
    assert docs.google("A word: no section.\n\nReturns what it was given.") == (
        "A word: no section.\n\nReturns what it was given."
    )


def test_names_are_linked_by_page() -> None:
    places = {"locate": "attribution", "load": "models"}
    assert docs.links("see `locate`", "resid_surgery.views", places) == "see [`locate`](attribution.html#locate)"
    assert docs.links("`resid_surgery.load`", "resid_surgery", places) == "[`load`](resid_surgery/models.html#load)"
    assert docs.links("`rs.load()` `other` ``locate``", "x.y", places) == (
        "[`load()`](models.html#load) `other` ``locate``"
    )


def test_every_docstring_keeps_its_words() -> None:
    """No rule loses text: letters of what was written, in order, apart from marks."""
    for name in rs.__all__:
        written = rs.__dict__.get(name, getattr(rs, name)).__doc__ or ""
        plain = re.findall(r"\w+", written)
        found = re.findall(r"\w+", docs.google(written).replace("######", "").replace("```python", ""))
        assert found == plain, name


@pytest.mark.parametrize("name", ["locate", "intervene", "record", "sweep", "patching"])
def test_no_argument_hides_in_anothers_line(name: str, pages: dict[str, str]) -> None:
    room = next(room for room, names in docs.rooms().items() if name in names)
    section = pages[f"resid_surgery/{room}.html"].split(f'<section id="{name}">')[1].split("</section>")[0]
    items = re.findall(r"<li><strong>([^<]+):</strong>", section)
    import inspect

    documented = {one.strip(" *") for item in items for one in item.split(",")}
    assert set(inspect.signature(getattr(rs, name)).parameters) <= documented, documented
