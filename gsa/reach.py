"""Whether a server answers over HTTP, asked once and briefly, and which proxy of the environment may be in the way."""

import os
from urllib.parse import urlsplit

from gsa.errors import one_line

PROXY_FAILED = (407, 502, 503, 504)  # a proxy's own answers where it does not let through, or does not get through


def unreachable(url: str, timeout: float = 5.0) -> str:
    """Why no server answers at a URL, on one line; empty where one does, whatever it answers."""
    import requests  # takes a while to import, and workers ask nobody

    try:
        answer = requests.get(url, timeout=timeout)
    except (requests.RequestException, ValueError) as error:
        return f"{_cause(error)}{proxy_in_the_way(url)}"
    proxy = proxy_in_the_way(url)
    return f"answer {answer.status_code}{proxy}" if proxy and answer.status_code in PROXY_FAILED else ""


def why_no_hub(error: Exception) -> str:
    """What an error of the Hugging Face hub says, with the proxy in the way where it is one of the connection."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    return f"{one_line(error)}{proxy_in_the_way(hub) if isinstance(error, ConnectionError) else ''}"


def proxy_in_the_way(url: str) -> str:
    """The variable of the environment that sends requests for a URL to a proxy, and what to do; empty without one.

    The proxy's user and password are left out.
    """
    from requests.utils import should_bypass_proxies

    try:
        parts = urlsplit(url)
        if not parts.hostname or should_bypass_proxies(url, None):
            return ""
    except ValueError:  # no URL
        return ""
    for name in (f"{parts.scheme}_proxy", f"{parts.scheme.upper()}_PROXY", "all_proxy", "ALL_PROXY"):
        if proxy := os.environ.get(name):
            advice = f"unset it, or add {parts.hostname} to no_proxy"
            return f"; through the proxy {_without_password(proxy)} of {name}: {advice}"
    return ""


def _without_password(proxy: str) -> str:
    scheme, separator, place = proxy.rpartition("://")
    return scheme + separator + place.rpartition("@")[2]


def _cause(error: BaseException) -> str:
    """What is at the bottom of an error of requests, which wraps it several times."""
    inner = error
    while isinstance(inner.args[:1] and inner.args[0], BaseException):
        inner = inner.args[0]
    return one_line(getattr(inner, "reason", None) or inner).rpartition(": ")[2]
