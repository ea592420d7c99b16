"""What holds for every test: the default ones have no network, and no library asks a hub for anything."""

import os
import signal
import socket
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
LOCAL = ("127.0.0.1", "::1", "localhost")


def pytest_configure() -> None:
    """A shell without job control starts background commands with SIGINT ignored, and every child would inherit that:
    the tests that press Ctrl-C would wait for ever."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections to other machines, so that a test cannot come to depend on one unnoticed."""
    if request.node.get_closest_marker("slow"):
        return
    connect = socket.socket.connect

    def connect_nearby(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] not in LOCAL:
            raise OSError(f"a default test wants to reach {address[0]}: mark it slow, or do without")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_nearby)
