"""The tables, as SQLAlchemy models. Times are seconds since 1970, money whole millionths of the price table's currency.

`entries` is the ledger: each row takes an amount from one account to another, so that all accounts together are always
zero, and no row is ever changed. Of a request: `reserve` (key -> held), `settle` (held -> sold), `release` (the rest:
held -> key).
`accounts` holds the same as sums per key, written in the same transactions: `ledger.audit` compares the two.

Nothing that a user wrote or read is here, but for answers kept under an Idempotency-Key, which are sealed by it.
"""

from sqlalchemy import BigInteger, Index, Integer, LargeBinary, String, UniqueConstraint, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

VALID, RUNNING = "revoked IS NULL", "ended IS NULL"


class Base(DeclarativeBase):
    pass


class Key(Base):
    __tablename__ = "keys"
    __table_args__ = (
        Index("keys_by_name", "name", unique=True, sqlite_where=text(VALID), postgresql_where=text(VALID)),
        Index("keys_by_change", "changed"),
    )
    id: Mapped[str] = mapped_column(String(20), primary_key=True)
    name: Mapped[str] = mapped_column(String(64))
    """Of one key at a time: that of a revoked one is free."""
    digest: Mapped[str] = mapped_column(String(64))
    scopes: Mapped[str] = mapped_column(String(200))
    rank: Mapped[str] = mapped_column(String(20))
    created: Mapped[int] = mapped_column(BigInteger)
    expires: Mapped[int | None] = mapped_column(BigInteger)
    revoked: Mapped[int | None] = mapped_column(BigInteger)
    used: Mapped[int | None] = mapped_column(BigInteger)
    """Some seconds late: it is written with what else there is to write."""
    changed: Mapped[int] = mapped_column(BigInteger)
    """Counts through all changes of all keys: a gateway asks for those after the last it has seen."""


class Account(Base):
    __tablename__ = "accounts"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    """The id of a key, or of an identity that is no row of `keys`."""
    budget: Mapped[int | None] = mapped_column(BigInteger)
    spent: Mapped[int] = mapped_column(BigInteger, default=0)
    held: Mapped[int] = mapped_column(BigInteger, default=0)


class Request(Base):
    __tablename__ = "requests"
    __table_args__ = (
        Index("requests_by_account", "account", "sent"),
        Index("requests_open", "gateway", sqlite_where=text(RUNNING), postgresql_where=text(RUNNING)),
    )
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    account: Mapped[str] = mapped_column(String(64))
    model: Mapped[str] = mapped_column(String(200))
    gateway: Mapped[str] = mapped_column(String(32))
    sent: Mapped[int] = mapped_column(BigInteger)
    hit_price: Mapped[int] = mapped_column(BigInteger)
    """Millionths of the currency for a million tokens, when it was sent."""
    miss_price: Mapped[int] = mapped_column(BigInteger)
    output_price: Mapped[int] = mapped_column(BigInteger)
    reserved: Mapped[int] = mapped_column(BigInteger)
    hit: Mapped[int] = mapped_column(BigInteger, default=0)
    """Tokens, this one and those below: while it runs, as they were a few seconds ago."""
    miss: Mapped[int] = mapped_column(BigInteger, default=0)
    output: Mapped[int] = mapped_column(BigInteger, default=0)
    """Reasoning included."""
    reasoning: Mapped[int] = mapped_column(BigInteger, default=0)
    ended: Mapped[str | None] = mapped_column(String(64))
    """finished, aborted or crashed (its gateway); None while it runs."""


class Entry(Base):
    __tablename__ = "entries"
    __table_args__ = (UniqueConstraint("request", "kind"),)
    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    request: Mapped[str] = mapped_column(String(32))
    """Of a grant: the key's id."""
    kind: Mapped[str] = mapped_column(String(16))
    source: Mapped[str] = mapped_column(String(80))
    target: Mapped[str] = mapped_column(String(80))
    amount: Mapped[int] = mapped_column(BigInteger)
    at: Mapped[int] = mapped_column(BigInteger)


class Gateway(Base):
    """A process that may have requests open, alive or not (`alive.py`)."""

    __tablename__ = "gateways"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    started: Mapped[int] = mapped_column(BigInteger)


class Repeat(Base):
    """What was answered under an Idempotency-Key, or that it runs."""

    __tablename__ = "repeats"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    """Hash of the account and the Idempotency-Key."""
    body: Mapped[str] = mapped_column(String(64))
    """Hash of route and body."""
    gateway: Mapped[str] = mapped_column(String(32))
    at: Mapped[int] = mapped_column(BigInteger)
    answer: Mapped[bytes | None] = mapped_column(LargeBinary)
    """Sealed; None while it runs."""


class Fact(Base):
    __tablename__ = "facts"
    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    value: Mapped[str] = mapped_column(String(200))
