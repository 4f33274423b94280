"""URLs of servers: whether requests can be sent to them, past which a proxy is bypassed, and credentials in them."""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import unquote, urlsplit, urlunsplit


def fault(url: str) -> str:
    """Why no request can be sent to ``url``, in a few words; "" if one can."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        (host or "").encode("idna")  # as the resolver encodes it
    except ValueError as error:
        return " ".join(str(error).split())
    if not url.isprintable() or " " in url:
        return "it has blanks or characters that cannot be printed"
    if parts.scheme not in ("http", "https"):
        return "it does not begin with http:// or https://"
    if not host or port == 0:
        return "it names no host" if not host else "port 0 is not a server's port"
    if "***" in url:
        return "its secrets are masked, as in a run's config.yaml: give the whole URL again"
    return ""


def without_credentials(url: str) -> tuple[str, tuple[str, str] | None]:
    """The URL without ``user:password@``, and user and password if there are any."""
    parts = urlsplit(url)
    credentials, at, place = parts.netloc.rpartition("@")
    if not at:
        return url, None
    user, _, password = credentials.partition(":")
    return urlunsplit(parts._replace(netloc=place)), (unquote(user), unquote(password))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host`` (an address or a name)."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def direct(*urls: str) -> dict[str, None]:
    """``mounts`` of an httpx client that exempt URLs on this machine from HTTP_PROXY."""
    hosts = [urlsplit(url).hostname or "" for url in urls if not fault(url)]
    ours = [host for host in hosts if is_loopback(host) or host in ("0.0.0.0", "::")]
    return {f"all://[{host}]" if ":" in host else f"all://{host}": None for host in ours}
