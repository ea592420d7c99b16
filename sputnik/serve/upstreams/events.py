"""Server-sent events out of bytes that may be split anywhere: the data of each, in order.

events = Events();  for data in events.feed(piece): ...       # ValueError: longer than anything honest
"""

LONGEST = 1 << 20
"""Bytes of one event."""


class Events:
    def __init__(self) -> None:
        self._rest = bytearray()
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, piece: bytes) -> list[bytes]:
        """Those that are complete now. Comments and fields other than data are passed over."""
        found: list[bytes] = []
        self._rest += piece
        if self._size + len(self._rest) > LONGEST:
            raise ValueError(f"an event of more than {LONGEST} bytes")
        if b"\n" not in piece:
            return found
        *lines, rest = self._rest.split(b"\n")
        self._rest = bytearray(rest)
        for line in lines:
            if line.endswith(b"\r"):
                line = line[:-1]
            if not line and self._data:
                found.append(b"\n".join(self._data))
                self._data, self._size = [], 0
            elif line.startswith(b"data:"):
                self._data.append(bytes(line[6:] if line.startswith(b"data: ") else line[5:]))
                self._size += len(line)
        return found
