"""The name of a process as `ps` and `top` show it: by role, not by interpreter."""

from sputnik.errors import MissingPackage


def set_title(title: str) -> None:
    try:
        from setproctitle import setproctitle
    except ImportError:
        raise MissingPackage("setproctitle", extra="serve") from None
    setproctitle(title)
