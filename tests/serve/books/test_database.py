"""The tables on SQLite and PostgreSQL: made, brought up and down, guarded against newer programs; keys in them."""

import contextlib
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text

from sputnik.errors import ConfigError
from sputnik.serve.books.database import Database, Down, downgrade, name_of, open_database, upgrade
from sputnik.serve.books.tables import Base


def test_steps_up_make_the_tables_of_the_models_and_steps_down_remove_them(database: Database) -> None:
    upgrade(database)  # again: nothing to do
    with database.writing() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    downgrade(database)
    with database.reading() as connection:
        assert set(inspect(connection).get_table_names()) <= {"alembic_version"}
    upgrade(database)
    with database.reading() as connection:
        assert set(Base.metadata.tables) <= set(inspect(connection).get_table_names())


def test_a_database_of_a_newer_program_is_refused_in_one_line(database: Database) -> None:
    with database.writing() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConfigError, match=r"^the database is a newer Sputnik's, of version 9999: update this one$"):
        upgrade(database)


def test_two_programs_that_start_at_once_make_the_tables_once(url: str) -> None:
    wrong: list[Any] = []

    def start() -> None:
        database = open_database(url)
        try:
            upgrade(database)
        except ConfigError as error:
            wrong.append(error)
        database.close()

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


def test_a_failed_block_leaves_nothing(database: Database, open_books: Callable[[], Database]) -> None:
    with pytest.raises(RuntimeError), database.writing() as connection:
        connection.execute(text("INSERT INTO facts (name, value) VALUES ('a', 'b')"))
        raise RuntimeError
    with open_books().reading() as connection:
        assert connection.execute(text("SELECT count(*) FROM facts")).scalar() == 0


def test_sqlite_flushes_each_commit_and_its_file_is_its_owners(tmp_path: Path) -> None:
    database = open_database(str(tmp_path / "made" / "books.db"))
    upgrade(database)
    with database.reading() as connection:
        settings = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")]
    assert settings == ["wal", 2]
    assert database.path is not None and stat.S_IMODE(database.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(database.path.parent.stat().st_mode) == 0o700
    database.close()


def test_a_reader_does_not_wait_for_a_writer_and_another_writer_waits_a_second(tmp_path: Path) -> None:
    one, other = open_database(str(tmp_path / "books.db")), open_database(str(tmp_path / "books.db"))
    upgrade(one)
    with one.writing():
        with other.reading() as connection:
            assert connection.execute(text("SELECT count(*) FROM keys")).scalar() == 0
        with pytest.raises(Down, match="database is locked"), other.writing():
            raise AssertionError("two writers at once")
    one.close()
    other.close()


def test_who_finds_no_free_connection_is_told_so(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database.reader.pool, "_timeout", 0.01)
    with contextlib.ExitStack() as stack, pytest.raises(Down, match="no connection is free"):
        for _ in range(40):
            stack.enter_context(database.reading())


@pytest.mark.parametrize("given", ["mysql://x/y", "nonsense://", "sqlite://"])
def test_other_urls_are_refused(given: str) -> None:
    with pytest.raises(ConfigError, match="give a path"):
        open_database(given)


def test_what_cannot_be_reached_is_one_line_without_the_password(tmp_path: Path) -> None:
    database = open_database(f"postgresql+psycopg://u:secret@/db?host={tmp_path}")
    with pytest.raises(ConfigError) as refused:
        upgrade(database)
    assert "secret" not in str(refused.value) and "\n" not in str(refused.value)
    assert "***" in name_of(database)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="name a file in a directory of yours"):
        upgrade(open_database(str(tmp_path / "file" / "books.db")))
