"""Whether a port is free. Asked before Granian listens: it shares ports, and two servers would divide the requests."""

import socket

from sputnik.errors import ConfigError


def check_free(host: str, port: int) -> None:
    """ConfigError if somebody listens there already."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"cannot listen on {host}:{port} ({reason}): choose another --port") from None
