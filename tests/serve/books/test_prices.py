"""What a request costs: the table that ships, tables of users, the clock."""

from datetime import datetime
from pathlib import Path

import pytest

from sputnik.errors import ConfigError
from sputnik.serve.books.prices import Price, Tokens, load_prices, money


def at(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def test_the_prices_of_the_launch() -> None:
    table = load_prices()
    assert table.currency == "USD"
    launch = at("2025-01-20T17:00:00+00:00")
    assert table.price("deepseek-reasoner", launch) == Price(140_000, 550_000, 2_190_000)
    assert table.price("deepseek-chat", launch) == Price(70_000, 270_000, 1_100_000)
    assert table.price("any other", launch) == table.price("deepseek-reasoner", launch)
    million = Tokens(hit=1_000_000, miss=1_000_000, output=1_000_000)
    assert money(table.price("deepseek-reasoner", launch).cost(million)) == "2.88"


@pytest.mark.parametrize(
    ("hour", "part"),
    [("16:29:59", 1.0), ("16:30:00", 0.25), ("23:59:59", 0.25), ("00:00:00", 0.25), ("00:30:00", 1.0)],
)
def test_off_peak_goes_over_midnight(hour: str, part: float) -> None:
    table, usual = load_prices(), Price(140_000, 550_000, 2_190_000)
    found = table.price("deepseek-reasoner", at(f"2025-03-01T{hour}+00:00"))
    assert (found.hit, found.miss, found.output) == tuple(
        round(each * part) for each in (usual.hit, usual.miss, usual.output)
    )


def test_the_most_is_never_less_than_the_cost() -> None:
    price = Price(140_000, 550_000, 2_190_000)
    for prompt, output in ((0, 0), (1, 0), (1, 1), (13, 4096), (999, 7)):
        for hit in {0, prompt // 2, prompt}:
            assert price.cost(Tokens(hit, prompt - hit, output)) <= price.most(prompt, output)
    assert price.cost(Tokens(miss=1)) == 1 and Price(0, 400_000, 0).cost(Tokens(miss=1)) == 0, "rounded once, half up"


def test_a_table_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(
        'currency = "CNY"\n[[price]]\nmodels = ["m"]\nhit = 1\nmiss = 2.5\noutput = 8\n'
        '[[price]]\nmodels = ["m"]\nsince = 2026-01-01T00:00:00Z\nhit = 2\nmiss = 5\noutput = 16\n'
    )
    table = load_prices(path)
    assert table.currency == "CNY"
    assert table.price("m", at("2025-12-31T23:59:59+00:00")) == Price(1_000_000, 2_500_000, 8_000_000)
    assert table.price("m", at("2026-01-01T00:00:00+00:00")) == Price(2_000_000, 5_000_000, 16_000_000)
    assert table.price("another", at("2026-01-01T00:00:00+00:00")) == Price(0, 0, 0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("price = 3", "Expected `array`"),
        ("[[price]]\nmodels = ['m']\nhit = 1\nmiss = 1\noutput = -1", "-1 is no price"),
        ("[[price]]\nmodels = ['m']\nhit = nan\nmiss = 1\noutput = 1", "NaN is no price"),
        ("[[price]]\nmodels = ['m']\nhit = 1\nmiss = 1\noutput = 1\nsince = 2026-01-01T00:00:00", "needs a zone"),
        ("[[price]]\nmodel = 'm'\nhit = 1\nmiss = 1\noutput = 1", "unknown field"),
        ("not toml", "Expected '='"),
    ],
)
def test_a_wrong_table_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_prices(path)
    with pytest.raises(ConfigError, match="No such file"):
        load_prices(tmp_path / "none.toml")


def test_money_has_two_to_six_places() -> None:
    found = [money(each) for each in (0, 1, 10, 1_500_000, 12_345_678, -20_000)]
    assert found == ["0.00", "0.000001", "0.00001", "1.50", "12.345678", "-0.02"]
