"""URLs that users pass: recognising one, and removing what may be secret from messages."""

from __future__ import annotations

import re

# The name of a value that is secret, as in the paths of some cameras: user=me_password=x_channel=1
_SECRET = r"(?:user(?:name)?|pass\w*?|pwd?|secret|token|key)="
_PORT = r"[0-9]{0,5}(?:[/?#]|[^\w\s]*(?:\s|$))"


def is_url(text: str) -> bool:
    """Whether a text is a URL, such as "https://host/a.png" or "data:image/png;base64,..."."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://|data:[^,]*,", text) is not None


def without_passwords(text: str) -> str:
    """Return a text whose URLs are without user names, passwords and values of a query. A URL ends
    at a space or a quote. Other parts of a path are not changed.

    Example
    -------
    >>> without_passwords("rtsp://me:secret@camera/1?token=2 is slow")
    'rtsp://camera/1?token=*** is slow'
    """
    text = re.sub(r"(?i)\b([a-z][a-z0-9+.-]{1,20}:/{1,2})[^\s'\"]*@", r"\1", text)

    def hidden(query: re.Match[str]) -> str:
        return query[1] + re.sub(r"([?&;#]+)([^=?&;#]*=)?[^?&;#]+", r"\1\2***", query[2])

    text = re.sub(r"(?i)\b([a-z][a-z0-9+.-]{1,20}:/[^\s'\"?]*)(\?[^\s'\"]*)", hidden, text)
    url = r"(?i)\b[a-z][a-z0-9+.-]{1,20}:/[^\s'\"]*"
    return re.sub(url, lambda found: _without_named(found[0]), text)


def _without_named(url: str) -> str:
    """Return a URL without whatever is in the place of its port and is no number, and without the
    values whose names are words for a user or a password, also in its path."""
    authority = rf"(?i)([a-z][a-z0-9+.-]+:/{{1,2}}[^/?#:\[\]]*:)(?!{_PORT}).*"
    url = re.sub(authority, r"\1***", url, flags=re.DOTALL)
    return re.sub(rf"(?i)({_SECRET}).*?(?=[_/][a-z]+=|[?&;#\s]|$)", r"\1***", url)


def without_secrets(url: str) -> str:
    """Return a text that is one URL as a whole without whatever may be secret in it.

    More is removed than a strict reader of URLs would remove, because a password may contain any
    character without an escape. Without a scheme, values are removed if the name of one of them is
    a word for a password.

    Example
    -------
    >>> without_secrets("rtsp://me:se cret@camera/1?token=2")
    'rtsp://camera/1?token=***'
    """
    scheme = r"([a-z][a-z0-9+.-]+:/*)"
    url = re.sub(f"{scheme}.*(?:@|%40)", r"\1", url, flags=re.IGNORECASE | re.DOTALL)
    if re.search(f"{scheme}(?<=/)|(pass\\w*|pwd?|secret|token|key)=", url, re.IGNORECASE):
        # A part after a separator is a value, or a name with "=" and a value.
        url = re.sub(r"([?&;#\s]+)([^=?&;#\s]*=)?[^?&;#\s]+", r"\1\2***", url.strip())
        url = _without_named(url)
    return url
