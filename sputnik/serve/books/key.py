"""The form of a key, and what is kept of it. Pure, but for the pepper's file.

    key = new_key()                     # sk- + 20 of id + 43 of secret + 6 of checksum, letters and digits
    id = id_of(key)                     # None: a typing error, or a key that is not ours
    digest(key, pepper)                 # all that is kept: HMAC-SHA-256

Scanners of source code find keys by `PATTERN` and need not ask us: the checksum tells a key from what looks like one.
The secret has 256 random bits, so a slow hash would protect nothing; the pepper, which is not in the database, makes
a stolen database useless for testing keys that were guessed or found elsewhere.
"""

import hashlib
import hmac
import os
import re
import secrets
import string
import zlib
from collections.abc import MutableMapping
from pathlib import Path

from sputnik.errors import ConfigError

ALPHABET = string.digits + string.ascii_letters
ID, SECRET, CHECKSUM = 20, 43, 6
SHOWN = 6
"""Characters of its id by which a key is shown."""
PATTERN = r"sk-[0-9A-Za-z]{69}"
KEY = re.compile(PATTERN)
PEPPER = re.compile(r"[0-9a-f]{64}")


def new_key() -> str:
    body = "sk-" + "".join(secrets.choice(ALPHABET) for _ in range(ID + SECRET))
    return body + _checksum(body)


def id_of(key: str) -> str | None:
    """The public part, by which it is looked up and listed."""
    if not KEY.fullmatch(key) or _checksum(key[:-CHECKSUM]) != key[-CHECKSUM:]:
        return None
    return key[3 : 3 + ID]


def digest(key: str, pepper: str) -> str:
    return hmac.new(bytes.fromhex(pepper), key.encode(), hashlib.sha256).hexdigest()


def shown(id: str) -> str:
    """How a list names a key."""
    return f"sk-{id[:SHOWN]}..."


def state_directory() -> Path:
    """Where a user's programs keep what they know, by the XDG rules."""
    home = os.environ.get("XDG_STATE_HOME", "")
    return (Path(home) if home else Path.home() / ".local" / "state") / "sputnik"


def read_pepper(environment: MutableMapping[str, str]) -> str:
    """SPUTNIK_PEPPER, which is taken out of `environment`; else that of the state directory, made on first use."""
    given = environment.pop("SPUTNIK_PEPPER", "")
    path = state_directory() / "pepper"
    if given:
        name, pepper = "SPUTNIK_PEPPER", given
    else:
        try:
            if not path.exists():
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                _write_secret(path, secrets.token_hex(32))
            name, pepper = str(path), path.read_text(encoding="ascii").strip()
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}: make it readable, or set SPUTNIK_PEPPER") from None
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"{path} can be read by others: chmod 600 {path}")
    if not PEPPER.fullmatch(pepper):
        raise ConfigError(f"{name} holds no pepper: it is 64 hexadecimal digits, as `openssl rand -hex 32` makes them")
    return pepper


def _write_secret(path: Path, text: str) -> None:
    """Of mode 0600 from the first moment; of two processes at once, one wins and both read the same."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(draft, path)
    except FileExistsError:
        return
    finally:
        draft.unlink()


def _checksum(body: str) -> str:
    """CRC-32 in base 62."""
    number, found = zlib.crc32(body.encode()), ""
    for _ in range(CHECKSUM):
        number, place = divmod(number, len(ALPHABET))
        found = ALPHABET[place] + found
    return found
