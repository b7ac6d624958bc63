"""Text that came from elsewhere (names, paths, what a file holds), made safe to stand in a page or in markdown."""

import re
from html import escape

# Of C0 and C1, and what turns the direction of the text around: a terminal obeys them, and so does a page.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_MARKDOWN = re.compile(r"[\\`*_\[\]~]")


def printable(value: object) -> str:
    """A value as text without controls."""
    return _CONTROLS.sub("\ufffd", str(value))


def html(value: object) -> str:
    """A value as HTML text, or as the value of an attribute between quotes."""
    return escape(printable(value))


def markdown_text(value: object) -> str:
    """A value within one line of markdown: no markup, no HTML, no end of a cell or a line is left in it."""
    line = " ".join(printable(value).splitlines())
    line = _MARKDOWN.sub(lambda found: "\\" + found[0], line)
    return line.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
