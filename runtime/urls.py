"""URLs that users pass: recognising one, and removing what may be secret from messages."""

from __future__ import annotations

import re


def is_url(text: str) -> bool:
    """Whether a text is a URL, such as "https://host/a.png" or "data:image/png;base64,..."."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://|data:[^,]*,", text) is not None


def without_passwords(text: str) -> str:
    """Return a text whose URLs are without user names, passwords and values of a query. A URL ends
    at a space or a quote.

    Example
    -------
    >>> without_passwords("rtsp://me:secret@camera/1?token=2 is slow")
    'rtsp://camera/1?token=*** is slow'
    """
    text = re.sub(r"(?i)\b([a-z][a-z0-9+.-]{1,20}:/{1,2})[^\s'\"]*@", r"\1", text)

    def hidden(query: re.Match[str]) -> str:
        return query[1] + re.sub(r"([?&;#]+)([^=?&;#]*=)?[^?&;#]+", r"\1\2***", query[2])

    return re.sub(r"(?i)\b([a-z][a-z0-9+.-]{1,20}:/[^\s'\"?]*)(\?[^\s'\"]*)", hidden, text)


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
    return url
