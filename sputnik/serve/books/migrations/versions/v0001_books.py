"""Keys, accounts, requests, entries, gateways, repeats."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "keys",
        sa.Column("id", sa.String(20), primary_key=True),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("scopes", sa.String(200), nullable=False),
        sa.Column("rank", sa.String(20), nullable=False),
        sa.Column("created", sa.BigInteger, nullable=False),
        *(sa.Column(name, sa.BigInteger) for name in ("expires", "revoked", "used")),
        sa.Column("changed", sa.BigInteger, nullable=False),
    )
    op.create_index("keys_by_change", "keys", ["changed"])
    valid = sa.text("revoked IS NULL")
    op.create_index("keys_by_name", "keys", ["name"], unique=True, sqlite_where=valid, postgresql_where=valid)
    op.create_table(
        "accounts",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("budget", sa.BigInteger),
        sa.Column("spent", sa.BigInteger, nullable=False),
        sa.Column("held", sa.BigInteger, nullable=False),
    )
    numbers = ("sent", "hit_price", "miss_price", "output_price", "reserved", "hit", "miss", "output", "reasoning")
    op.create_table(
        "requests",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("account", sa.String(64), nullable=False),
        sa.Column("model", sa.String(200), nullable=False),
        sa.Column("gateway", sa.String(32), nullable=False),
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in numbers),
        sa.Column("ended", sa.String(64)),
    )
    op.create_index("requests_by_account", "requests", ["account", "sent"])
    running = sa.text("ended IS NULL")
    op.create_index("requests_open", "requests", ["gateway"], sqlite_where=running, postgresql_where=running)
    op.create_table(
        "entries",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("request", sa.String(32), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("source", sa.String(80), nullable=False),
        sa.Column("target", sa.String(80), nullable=False),
        sa.Column("amount", sa.BigInteger, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.UniqueConstraint("request", "kind"),
    )
    op.create_table(
        "gateways",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("started", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "repeats",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("body", sa.String(64), nullable=False),
        sa.Column("gateway", sa.String(32), nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("answer", sa.LargeBinary),
    )
    op.create_table(
        "facts",
        sa.Column("name", sa.String(32), primary_key=True),
        sa.Column("value", sa.String(200), nullable=False),
    )


def downgrade() -> None:
    for table in ("facts", "repeats", "gateways", "entries", "requests", "accounts", "keys"):
        op.drop_table(table)
