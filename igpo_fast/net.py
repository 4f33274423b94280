"""URLs of servers: whether they can be asked, which of them a proxy must not see, and the credentials in them."""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import unquote, urlsplit, urlunsplit


def fault(url: str) -> str:
    """Why no request can be sent to ``url``, in a few words; "" if one can."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        (host or "").encode("idna")  # as the resolver will
    except ValueError as error:
        return " ".join(str(error).split())
    if not url.isprintable() or " " in url:
        return "it has blanks or characters that cannot be printed"
    if parts.scheme not in ("http", "https"):
        return "it begins with neither http:// nor https://"
    if not host or port == 0:
        return "it names no host" if not host else "port 0 is no server's"
    if "***" in url:
        return "its secrets are masked, as in a run's config.yaml: give the whole URL again"
    return ""


def without_credentials(url: str) -> tuple[str, tuple[str, str] | None]:
    """The URL without ``user:password@``, and these two if they are there."""
    parts = urlsplit(url)
    credentials, at, place = parts.netloc.rpartition("@")
    if not at:
        return url, None
    user, _, password = credentials.partition(":")
    return urlunsplit(parts._replace(netloc=place)), (unquote(user), unquote(password))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``, an address or a name."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def direct(*urls: str) -> dict[str, None]:
    """``mounts`` of an httpx client by which HTTP_PROXY does not apply to the URLs that are on this machine."""
    hosts = [urlsplit(url).hostname or "" for url in urls if not fault(url)]
    ours = [host for host in hosts if is_loopback(host) or host in ("0.0.0.0", "::")]
    return {f"all://[{host}]" if ":" in host else f"all://{host}": None for host in ours}
