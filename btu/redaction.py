"""Texts without secrets: what may be printed, saved or sent of a URL.

A password may contain ``@``, ``/``, ``:`` or ``#``, although a URL should escape them. Where it is
not certain what belongs to a password, the longer part is left out.
"""

from __future__ import annotations

import re

# In place of the value of a query parameter.
HIDDEN = "***"
# A URL, or several joined by "::", up to where it ends in a text.
_URL = re.compile(r"[A-Za-z][\w+.-]*://[^\s\"'`<>]*")
# Between the URLs of a chain, as in simplecache::sftp://...
_CHAIN = re.compile(r"::(?=[A-Za-z][\w+.-]*(?:://|::))")
# A query without its URL, as in the errors of HTTP clients.
_SECRET = re.compile(
    r"([?&;](?:[\w.-]*(?:password|passwd|pwd|token|secret|credential|signature|key)[\w.-]*"
    r"|sig|auth|x-amz-[\w-]+)=)[^&;\s\"'`<>]+",
    re.IGNORECASE,
)
# Credentials of a header, as in the errors of HTTP clients that refuse one.
_HEADER = re.compile(r"\b(Bearer|Basic) +[^\s\"'`<>]+")


def shown(text: str) -> str:
    """Return a text without credentials.

    Its URLs lose user names, passwords and values of queries; headers lose what authorizes.
    """
    text = _HEADER.sub(rf"\1 {HIDDEN}", text)
    return _SECRET.sub(rf"\1{HIDDEN}", _URL.sub(lambda found: shown_url(found[0]), text))


def shown_url(url: str) -> str:
    """Return a URL, or a chain of them, without user names, passwords and values of queries.

    The whole text is one URL, spaces included; what is not a URL is returned as it is.
    """
    return "::".join(map(_shown_part, _CHAIN.split(url)))


def has_secret(url: str) -> bool:
    """Return whether a URL has a part that `shown_url` leaves out."""
    return shown_url(url) != url


def _shown_part(part: str) -> str:
    scheme, separator, rest = part.partition("://")
    if not separator:
        return part
    # Without a user name an "@" is of the path: s3://bucket/a@b, http://host:5000/a@b. A ":"
    # without a port behind it stands before a password with "/" in it.
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    port = re.fullmatch(r"([^:\[]*|\[[^\]]*\])(:\d{1,5})?", authority)
    if "@" in authority or (not port and "@" in rest):
        rest = rest.rpartition("@")[2]
    place, mark, query = rest.partition("?")
    if "=" in query:
        query = re.sub(r"=[^&;#]*", f"={HIDDEN}", query)
    return f"{scheme}://{place}{mark}{query}"
