"""The API reference: one page a room of the package, built by pdoc from docstrings, and the table of errors.md.

    python .docs/build.py out/docs

Docstrings are written for people who read code: several arguments on a line where they are short. Here they are put
into the form that pdoc's Google style wants, by rule, so that no docstring has to be written for the generator.
"""

import inspect
import re
import sys
import types
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path

import pdoc
import pdoc.doc
import pdoc.docstrings
import pdoc.render
from jinja2 import pass_context

import resid_surgery as rs

HERE = Path(__file__).parent
LISTS = "Args|Attributes|Raises"
SECTION = re.compile(
    rf"^(?P<name>{LISTS}|Returns|Yields|Example):(?P<rest>[^\n]*)\n?(?P<body>(?:[ \t]+[^\n]*\n?|\n)*)", re.M
)
NAME = r"\*{0,2}[a-z_]\w*"
NEXT_ARGUMENT = re.compile(rf"(?<=[.;)]) +(?={NAME}(?:, {NAME})*: )")
NEXT_ERROR = re.compile(r"(?<=[.;)]) +(?=[A-Z]\w*Error(?:, \w+Error)*: )")
TERM = re.compile(r"``([^`\n]+)``")
REFERENCE = re.compile(r"(?<![`\[\w])`(?:resid_surgery\.|rs\.)?(\w+)(\(\))?`(?!`)")
ROOMS = {
    "": "Addresses, errors",
    "models": "Open a model",
    "stream": "Read the stream",
    "attribution": "Find who wrote it",
    "surgery": "Operate",
    "evidence": "Hold it against measurement",
    "editing": "Edit and validate",
    "experiments": "Many prompts",
    "views": "Look at it",
}


def rooms() -> dict[str, list[str]]:
    """Room -> the public names that live in it, in the order in which the package lists them."""
    found: dict[str, list[str]] = {room: [] for room in ROOMS}
    for module, names in rs._HOMES.items():
        room = module.split(".")[0] if "." in module else ""
        found[room] += names.split()
    return found


def page(room: str, names: list[str]) -> types.ModuleType:
    """A module that holds a room's public names and nothing else: what pdoc makes a page of."""
    title = f"resid_surgery.{room or 'basics'}"
    module = types.ModuleType(title)
    about = inspect.getdoc(import_module(f"resid_surgery.{room}")) if room else None
    module.__doc__ = f"## {ROOMS[room]}\n\n{about or 'What everything else speaks in.'}\n\n{contents(names)}"
    module.__dict__.update({name: getattr(rs, name) for name in names})
    module.__all__ = names  # type: ignore[attr-defined]
    return module


def front(found: Mapping[str, list[str]]) -> types.ModuleType:
    """The first page: every public name with its first line, by room."""
    module = types.ModuleType("resid_surgery")
    parts = [
        f"## [{ROOMS[room]}](resid_surgery/{room or 'basics'}.html)\n\n{contents(names)}"
        for room, names in found.items()
    ]
    start = "\n\n".join(inspect.cleandoc(rs.__doc__ or "").split("\n\n")[:1])
    said = (
        "`import resid_surgery as rs`; every name below is `rs.name`. What is refused, and in which words: "
        "[conditions and errors](resid_surgery/conditions.html)."
    )
    module.__doc__ = "\n\n".join([start, said, *parts])
    module.__all__ = []  # type: ignore[attr-defined]
    return module


def conditions() -> types.ModuleType:
    """The page of what works and what is refused: errors.md."""
    module = types.ModuleType("resid_surgery.conditions")
    module.__doc__ = (HERE / "errors.md").read_text(encoding="utf-8")
    module.__all__ = []  # type: ignore[attr-defined]
    return module


def contents(names: list[str]) -> str:
    """A list of names with the first line of what each says."""
    return "\n".join(f"- `{name}`: {summary(getattr(rs, name))}" for name in names)


def summary(value: object) -> str:
    """The first sentence of a docstring."""
    text = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[\w)]\.) (?=[A-Z`])", text)[0].rstrip(":")


def google(docstring: str) -> str:
    """A docstring of this package in pdoc's Google style: an item a line, examples as code, sources in italics."""
    text = SECTION.sub(_section, inspect.cleandoc(docstring))
    text = re.sub(r"^Source: ?((?:.+\n?)+)", lambda m: f"*Source: {' '.join(m[1].split())}*\n", text, flags=re.M)
    return TERM.sub(r"`\1`", text)


def _section(found: re.Match[str]) -> str:
    name, rest, body = found["name"], found["rest"].strip(), inspect.cleandoc(f"\n{found['body']}")
    if name == "Example":
        return f"###### Example:\n\n```python\n{body}\n```\n\n"
    body = "\n".join(filter(None, [rest, body]))
    if name in LISTS.split("|"):
        body = "\n".join(_items(body, NEXT_ERROR if name == "Raises" else NEXT_ARGUMENT))
    return f"{name}:\n" + "\n".join(f"    {line}" if line else "" for line in body.split("\n")) + "\n\n"


def _items(body: str, following: re.Pattern[str]) -> list[str]:
    """One argument or error a line, wrapped lines joined."""
    joined = " ".join(line.strip() for line in body.split("\n") if line.strip())
    return following.split(joined)


def links(text: str, here: str, places: Mapping[str, str]) -> str:
    """`name`, `rs.name` and `resid_surgery.name` as links to where the name is documented."""
    up = "resid_surgery/" if here == "resid_surgery" else ""

    def link(found: re.Match[str]) -> str:
        name, call = found[1], found[2] or ""
        return found[0] if name not in places else f"[`{name}{call}`]({up}{places[name]}.html#{name})"

    return REFERENCE.sub(link, text)


def converter(places: Mapping[str, str]) -> Callable[..., str]:
    """pdoc's filter for docstrings, with this package's form and links."""

    @pass_context
    def convert(context: Mapping[str, pdoc.doc.Module], docstring: str) -> str:
        name = context["module"].modulename
        return pdoc.docstrings.google(links(google(docstring), name, places))

    return convert


def build(out: Path) -> list[Path]:
    """Write every page; returns them."""
    found = rooms()
    places = {name: room or "basics" for room, names in found.items() for name in names}
    pdoc.render.configure(docformat="google", template_directory=HERE, footer_text=f"resid_surgery {rs.__version__}")
    pdoc.render.env.filters["to_markdown"] = converter(places)
    pages = (front(found), *(page(*one) for one in found.items()), conditions())
    modules = {one.__name__: pdoc.doc.Module(one) for one in pages}
    texts = {f"{name.replace('.', '/')}.html": pdoc.render.html_module(one, modules) for name, one in modules.items()}
    texts["index.html"] = pdoc.render.html_index(modules)
    if search := pdoc.render.search_index(modules):
        texts["search.js"] = search
    for name, text in texts.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in texts]


if __name__ == "__main__":
    for path in build(Path(sys.argv[1] if len(sys.argv) > 1 else "out/docs")):
        sys.stdout.write(f"wrote {path}\n")
