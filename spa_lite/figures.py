"""What all figures share: colours, one style whose bytes repeat, text that is shown and never obeyed, and how a figure
becomes a file, or part of a page that is light or dark."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from spa_lite.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Told apart by colour-blind people too (M. Okabe and K. Ito, 2008); lines also differ in marker and dashes."""
INK, FAINT, RULE = "#1b1b1f", "#6b6b75", "#dcdce2"
"""Text and axes; what is said beside; lines of the grid."""
THEMED = {INK: "currentColor", FAINT: "var(--faint)", RULE: "var(--rule)"} | {
    colour.lower(): f"var(--series-{i})" for i, colour in enumerate(COLOURS, 1)
}
"""What a page's style sheet gives these colours as, so that a figure follows the theme."""

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"


@contextmanager
def style(**more: Any) -> Iterator[None]:
    """Draw inside this block: names as they are and never as formulas, and bytes that repeat."""
    import matplotlib

    settings: dict[Any, Any] = {
        "svg.hashsalt": "spa-lite",
        "text.usetex": False,
        "text.parse_math": False,
        "font.size": 9.0,
    }
    with matplotlib.rc_context(settings | more), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the font has no sign for it: a box
        yield


def new(width: float, height: float, **more: Any) -> tuple[Figure, Axes]:
    """An empty figure (inches), without pyplot and its global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), **more)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def rendered(figure: Figure, kind: str, **more: Any) -> bytes:
    """A figure as `svg` or `png`: the same bytes every time."""
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    content = io.BytesIO()
    figure.savefig(content, format=kind, dpi=160, metadata=metadata, **more)
    return content.getvalue()


def write_figure(figure: Figure, path: Path, kinds: tuple[str, ...], **more: Any) -> list[Path]:
    """Write a figure beside `path` in each of the formats; return the files."""
    written = [path.with_name(f"{path.name}.{kind}") for kind in kinds]
    for file, kind in zip(written, kinds, strict=True):
        write_atomic(file, rendered(figure, kind, **more))
    return written


def inline_svg(figure: Figure, name: str, title: str, description: str) -> str:
    """A figure as an element of a page: themed colours, the page's font, ids that begin with `name`.

    Draw it with `style(**{"svg.fonttype": "none"})`, so that its text is text.
    """
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(rendered(figure, "svg", transparent=True))
    width = root.attrib.pop("width")
    del root.attrib["height"]
    for useless in root.findall(f"{{{SVG}}}metadata"):
        root.remove(useless)
    for element in root.iter():
        for key, value in element.attrib.items():
            element.set(key, _themed(key.rpartition("}")[2], value, name))
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title {name}-text", "style": f"width: {width}"}
    for tag, text in (("desc", description), ("title", title)):
        said = ElementTree.Element(f"{{{SVG}}}{tag}", {"id": f"{name}-{'title' if tag == 'title' else 'text'}"})
        said.text = visible(text)
        root.insert(0, said)
    return ElementTree.tostring(root, encoding="unicode")


def _themed(key: str, value: str, name: str) -> str:
    """An attribute with this page's colours, font and ids."""
    if key == "id":
        return f"{name}-{value}"
    if key == "href" and value.startswith("#"):
        return f"#{name}-{value[1:]}"
    if key in {"style", "fill", "stroke", "clip-path"}:
        for colour, themed in THEMED.items():
            value = value.replace(colour, themed)
        value = value.replace("url(#", f"url(#{name}-")
        return "; ".join(_without_font(value)) if key == "style" else value
    return value


def _without_font(declarations: str) -> Iterator[str]:
    """The declarations of a style, of fonts the size alone."""
    for declaration in declarations.split(";"):
        key, _, value = declaration.strip().partition(":")
        if key == "font":
            yield f"font-size: {value.split()[0]}"
        elif key != "font-family":
            yield declaration.strip()


def visible(text: str, keep: str = "") -> str:
    """Text with control characters and direction overrides shown instead of obeyed; those in `keep` stay."""
    return "".join(char if char.isprintable() or char in keep else f"\\u{ord(char):04x}" for char in text)


def short(text: str, width: int = 30) -> str:
    """A name on one short line."""
    text = visible(text)
    return text if len(text) <= width else f"{text[: width - 1]}…"


def label(text: str, width: int = 38) -> str:
    """A name, broken into at most four short lines."""
    return "\n".join(textwrap.wrap(visible(text), width, max_lines=4, placeholder=" …")) or "(no name)"
