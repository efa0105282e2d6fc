"""Lettering: token texts as they can stand in a figure. Dollars are no mathematics, and nothing is left out unseen."""

from functools import cache
from typing import Any

ELLIPSIS, BLANK = "\u2026", "\u2423"


def plain(text: Any) -> str:
    """A text that matplotlib draws as it is written.

    Dollar signs are escaped (two of them would be read as mathematics), and characters that cannot be printed, or that
    the figure's font has not, stand as their escapes, such as ``\\u7684``.
    """
    known = _known(_families())
    return "".join(one if _drawn(one, known) else escaped(one) for one in str(text)).replace("$", r"\$")


def quoted(token: Any, most: int | None = None) -> str:
    """A token in quotes, so that its leading blank is seen; longer ones than `most` characters end in an ellipsis."""
    return plain(repr(shortened(str(token), most)))


def spaced(token: Any, most: int | None = None) -> str:
    """A token without quotes, its blanks drawn as open boxes; an empty one as a pair of quotes."""
    text = quoted(token, most)[1:-1]
    return text.replace(" ", BLANK if ord(BLANK) in _known(_families()) else " ") or "''"


def series(name: Any) -> str:
    """The name of a series in a legend; quoted where it begins with an underscore, as matplotlib leaves those out."""
    text = str(name)
    return quoted(text) if text.startswith("_") or not text.strip() else plain(text)


def shortened(text: str, most: int | None) -> str:
    """The first characters of a text, with an ellipsis where some are left out."""
    return text if most is None or len(text) <= most else text[: max(1, most - 1)] + ELLIPSIS


def _drawn(one: str, known: frozenset[int]) -> bool:
    return one.isprintable() and ord(one) in known


def escaped(one: str) -> str:
    """A character as its escape, such as ``\\u7684``."""
    return one.encode("unicode_escape").decode("ascii")


def _families() -> tuple[str, ...]:
    from matplotlib import rcParams

    return tuple(rcParams["font.family"])


@cache
def _known(families: tuple[str, ...]) -> frozenset[int]:
    """Code points that the first font of each family has: matplotlib falls back from one to the next."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    paths = {findfont(FontProperties(family=[name])) for name in families}
    return frozenset(code for path in paths for code in get_font(path).get_charmap())
