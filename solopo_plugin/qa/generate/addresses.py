"""Say where servers are and how to reach them: addresses and keys checked, proxies and certificates of the environment.

No user, password or key stands in a message.
"""

import base64
import ipaddress
import os
import re
from contextlib import suppress
from typing import NamedTuple
from urllib.request import getproxies, proxy_bypass

import httpx

from ..files import DataError


def api_key(api_key_env: str) -> str:
    """Return the key in an environment variable without white space around it; empty where there is none.

    Raises:
        DataError: It has characters that no HTTP header can carry, or stands in place of the variable's name.
    """
    if api_key_env not in os.environ and not re.fullmatch("[A-Z_][A-Z0-9_]*", api_key_env):
        raise DataError(
            "`api_key_env` must be the name of an environment variable, such as OPENAI_API_KEY, and not the key "
            "itself; there is none of the name that is given."
        )
    key = os.environ.get(api_key_env, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise DataError(
            f"The environment variable {api_key_env} holds no key: it has characters (such as a new line, or a "
            "letter beyond ASCII) that no header can carry; set it to the key alone."
        )
    return key


class Address(NamedTuple):
    """Hold a server: `url` without credentials and up to its /v1, and (user, password) where the address has them."""

    url: str
    auth: tuple[str, str] | None

    @property
    def via(self) -> str:
        """Return which proxy the environment names for it, in brackets, for messages; empty where there is none."""
        proxy = proxy_of(httpx.URL(self.url))
        return f" (through the proxy {without_credentials(proxy)} of the environment)" if proxy else ""

    @property
    def secrets(self) -> list[str]:
        """Return what must not be shown of it, as it is and as a header has it."""
        if not self.auth:
            return []
        return [self.auth[1] or self.auth[0], base64.b64encode(":".join(self.auth).encode()).decode()]


def addresses(server_urls: str | None) -> list[Address]:
    """Return the servers that `server_urls` names, checked.

    Raises:
        DataError: None, or one that can be no server's; what may be a password is not shown.
    """
    found = []
    for text in re.split(r",(?=\s*\w+://)", server_urls or ""):  # a password may hold commas
        if not (text := text.strip(" \t\r\n,")):
            continue
        shown = without_credentials(text)
        if not re.match("https?://", text, re.IGNORECASE):
            raise DataError(f"`server_urls` must begin with http:// or https://, got {shown!r}.")
        with suppress(httpx.InvalidURL):
            url = httpx.URL(text)
            named = ":" in url.host or re.fullmatch(r"[\w.-]+", url.host)
            port = 80 if url.port is None else url.port
            if named and 0 < port < 2**16 and not url.query and not url.fragment:
                plain = str(url.copy_with(userinfo=b"")).rstrip("/")
                auth = (url.username, url.password) if url.userinfo else None
                found.append(Address(plain if url.path.strip("/") else f"{plain}/v1", auth))
                continue
        raise DataError(
            f"`server_urls` has {shown!r}, which is no address of a server; write it like http://localhost:8000/v1 or "
            "http://[::1]:8000/v1, with nothing behind the path."
        )
    if not found:
        raise DataError("`backend: openai` needs `server_urls`, for example http://localhost:8000/v1.")
    return found


def without_credentials(address: str) -> str:
    """Return an address as a message may show it, well formed or not: no user, no password, no query."""
    return re.sub(r"^(\w+://)?.*@", r"\1", address, flags=re.DOTALL).split("?")[0].split("#")[0]


def is_local(host: str) -> bool:
    """Return whether a host name or IP address means this machine."""
    with suppress(ValueError):
        address = ipaddress.ip_address(host)
        return address.is_loopback or address.is_unspecified
    return host == "localhost" or host.endswith(".localhost")


def proxy_of(url: httpx.URL) -> str | None:
    """Return the proxy that the environment names for a server, with its credentials; none for one on this machine."""
    if is_local(url.host) or proxy_bypass(url.netloc.decode("ascii")):
        return None
    proxies = getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    return proxy if not proxy or "://" in proxy else f"http://{proxy}"


def transports(places: list[Address], concurrency: int) -> tuple[httpx.AsyncHTTPTransport, dict]:
    """Return what carries requests straight to servers, and by address those that go through a proxy.

    Raises:
        DataError: The environment names certificates that cannot be loaded, or a proxy that cannot be used.
    """
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    try:
        context = httpx.create_ssl_context()
    except OSError as error:
        raise DataError(
            "The certificates that the environment variable SSL_CERT_FILE or SSL_CERT_DIR names cannot be loaded "
            f"({error.strerror or error}); correct or unset it."
        ) from None
    by_proxy = {}
    for place in places:
        if proxy := proxy_of(httpx.URL(place.url)):
            shown = without_credentials(proxy)
            try:
                by_proxy[place.url] = httpx.AsyncHTTPTransport(proxy=proxy, verify=context, limits=limits)
            except ImportError:
                raise DataError(
                    f"{place.url} is to be asked through the proxy {shown} of the environment, which needs the package "
                    "socksio: pip install 'httpx[socks]', or name the server in NO_PROXY."
                ) from None
            except (ValueError, httpx.InvalidURL):
                raise DataError(
                    f"The environment names {shown!r} as the proxy for {place.url}, which is no address of one; "
                    "correct HTTP_PROXY, HTTPS_PROXY or ALL_PROXY, or name the server in NO_PROXY."
                ) from None
    return httpx.AsyncHTTPTransport(verify=context, limits=limits), by_proxy
