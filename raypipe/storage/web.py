"""Requests to the web: under raypipe's own name, and on behalf of a list never into this machine's own network."""

from __future__ import annotations

import ipaddress
import socket
from importlib.metadata import version


class Private(OSError):
    """An address, after its name was resolved, that is no public one."""

    def __init__(self) -> None:
        super().__init__("it leads into a private network")


def web_files(*, public: bool):
    """fsspec's file system of web addresses. public: it connects to public addresses alone, also after a redirect.

    Elsewhere a read ends with an aiohttp.ClientConnectorError whose `os_error` is Private. Raises ImportError.
    """
    from fsspec.implementations.http import HTTPFileSystem

    return HTTPFileSystem(get_client=_public_client if public else _client)


async def _client(*, connector=None, **kwargs):
    import aiohttp

    # Its own name: some hosts refuse those of libraries.
    agent = f"raypipe/{version('raypipe')} (image labelling) aiohttp/{aiohttp.__version__}"
    return aiohttp.ClientSession(headers={"User-Agent": agent}, connector=connector, **kwargs)


async def _public_client(**kwargs):
    import aiohttp

    return await _client(connector=aiohttp.TCPConnector(socket_factory=_public_socket), **kwargs)


def _public_socket(info: tuple) -> socket.socket:
    """A socket for one resolved address, right before it is connected: no later answer of a name server counts."""
    family, kind, protocol, _, (host, *_) = info
    if not is_public(host):
        raise Private
    return socket.socket(family, kind, protocol)


def is_public(host: str) -> bool:
    """Whether a numeric address is in the internet: not loopback, private, link-local, shared, reserved or a group."""
    address = ipaddress.ip_address(host.partition("%")[0])
    inner = None if address.version == 4 else address.ipv4_mapped or address.sixtofour
    return address.is_global and not address.is_multicast and (inner is None or is_public(str(inner)))


def leads_outside(host: str) -> bool:
    """Whether a name, with or without a port, means public addresses only, or none. Asks the name server."""
    try:
        found = socket.getaddrinfo(_without_port(host), None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return True
    return all(is_public(address[0]) for *_, address in found)


def _without_port(host: str) -> str:
    return host.partition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
