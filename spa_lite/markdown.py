"""Text from models and files inside Markdown."""

from __future__ import annotations

import re

from spa_lite.figures import visible


def literal(text: str) -> str:
    """Text that Markdown shows as it is, on one line. An underscore between letters needs no care."""
    text = visible(text).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*\[\]>|~$]|(?<!\w)_|_(?!\w))", r"\\\1", text)
