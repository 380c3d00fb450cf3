"""Build HTML and SVG. Every text is escaped unless `element` made it."""

import html
import re

from hanorec.run.files import printable

VOID = ("input", "meta")  # elements without an end tag
# Control characters, halves of pairs, and marks that turn the direction of the text after them
UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


class Html(str):
    """A text that is HTML already."""


def escaped(value) -> Html:
    r"""Return a value as HTML text. An Html stays as it is.

    >>> escaped("<b> & \x07"), escaped(Html("<b>"))
    ('&lt;b&gt; &amp; \\x07', '<b>')
    """
    if isinstance(value, Html):
        return value
    return Html(html.escape(UNSHOWN.sub(lambda match: printable(match[0]), str(value))))


def element(name: str, /, *children, **attributes) -> Html:
    """Return an element.

    Args:
        children: texts and elements, in order. None is left out.
        attributes: an underscore stands for a dash; the last one is dropped, as in `class_`. None is left out.

    >>> element("p", "a < b", class_="note")
    '<p class="note">a &lt; b</p>'
    """
    words = [name]
    for key, value in attributes.items():
        if value is not None:
            words.append(f'{key.rstrip("_").replace("_", "-")}="{escaped(value)}"')
    start = f"<{' '.join(words)}>"
    if name in VOID:
        return Html(start)
    return Html(f"{start}{joined(children)}</{name}>")


def joined(parts) -> Html:
    """Return texts and elements one after the other. None is left out."""
    return Html("".join(escaped(part) for part in parts if part is not None))
