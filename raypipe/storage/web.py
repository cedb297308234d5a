"""Requests to the web: under raypipe's own name, and on behalf of a list never into this machine's own network."""

from __future__ import annotations

import ipaddress
import socket
from functools import lru_cache, partial
from importlib.metadata import version
from urllib.parse import urlsplit

NAT64, UNICAST = ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("2000::/3")  # RFC 6052, RFC 4291


class Private(OSError):
    """An address, after its name was resolved, that is no public one."""

    def __init__(self) -> None:
        super().__init__("it leads into a private network")


def web_files(*, public: bool):
    """fsspec's file system of web addresses. public: it connects to public addresses alone, also after a redirect.

    Elsewhere a read ends with an aiohttp.ClientConnectorError whose `os_error` is Private. Raises ImportError.
    """
    from fsspec.implementations.http import HTTPFileSystem

    return HTTPFileSystem(get_client=partial(_client, public=public))


async def _client(*, public: bool, **kwargs):
    import aiohttp

    # Its own name: some hosts refuse those of libraries.
    agent = f"raypipe/{version('raypipe')} (image labelling) aiohttp/{aiohttp.__version__}"
    connector = aiohttp.TCPConnector(socket_factory=_public_socket) if public else None
    return aiohttp.ClientSession(headers={"User-Agent": agent}, connector=connector, **kwargs)


def _public_socket(info: tuple) -> socket.socket:
    """A socket for one resolved address, right before it is connected: no later answer of a name server counts."""
    family, kind, protocol, _, (host, *_) = info
    if not is_public(host):
        raise Private
    return socket.socket(family, kind, protocol)


def is_public(host: str) -> bool:
    """Whether a numeric address is in the internet: not loopback, private, link-local, shared, reserved or a group."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if address.version == 4:
        return address.is_global and not address.is_multicast
    inner = address.ipv4_mapped or address.sixtofour
    inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if address in NAT64 else inner
    return is_public(str(inner)) if inner else address.is_global and address in UNICAST


@lru_cache(maxsize=256)
def leads_outside(host: str) -> bool:
    """Whether a name, with or without a port, means public addresses only, or none. Asks the name server."""
    try:
        found = socket.getaddrinfo(urlsplit(f"//{host}").hostname, None, type=socket.SOCK_STREAM)
    except (OSError, ValueError):  # also a UnicodeError
        return True
    return all(is_public(address[0]) for *_, address in found)
