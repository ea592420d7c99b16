"""The stages a recipe is made of, on the help texts of Python and a few worked sums: no network, seconds."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from sputnik.errors import ConfigError, DataError, TaskError
from sputnik.recipe.recipe import read_recipe
from sputnik.recipe.runner import run_recipe
from sputnik.recipe.stages import KINDS, kind_of
from sputnik.text.corpus import PackedCorpus, read_info
from sputnik.text.tokenizer import Tokenizer

CORPUS = """
[model]
preset = "tiny"
[[stage]]
name = "corpus"
kind = "corpus"
texts = ["python-topics"]
tokens = 200_000
vocab_size = 600
task = "arithmetic"
examples = 300
"""


def run(folder: Path, text: str, *overrides: str) -> Path:
    path = folder / "small.toml"
    path.write_text(text)
    recipe = read_recipe(path, kind_of, overrides)
    return run_recipe(recipe, folder / "runs", kind_of, Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("corpus"), CORPUS) / "corpus"


def description(corpus: Path) -> dict[str, Any]:
    return json.loads((corpus / "corpus.json").read_text())


def test_corpus_holds_half_examples_by_tokens(corpus: Path) -> None:
    tok = Tokenizer.load(corpus / "tokenizer")
    ids = np.fromfile(corpus / "train" / "tokens-00000.bin", dtype=read_info(corpus / "train").dtype)
    text = tok.decode(ids.tolist())
    assert description(corpus)["train"]["tokens"] >= 200_000
    documents = text.split("<｜begin▁of▁sentence｜>")
    examples = [document for document in documents if "<｜User｜>" in document]
    share = sum(len(tok.encode_with_special(example)) for example in examples) / ids.size
    assert 0.4 < share < 0.6  # a single help text may be 10 % of all this


def test_corpus_says_where_it_comes_from(corpus: Path) -> None:
    told = description(corpus)
    assert told["sources"]["python-topics"]["licence"] == "PSF-2.0"
    assert sum(style["examples"] for style in told["styles"].values()) == 300
    assert told["held_out"]["tokens"] > 0 and told["template"] == "chat"


def test_held_out_texts_are_not_trained_on(corpus: Path) -> None:
    tok = Tokenizer.load(corpus / "tokenizer")
    held = PackedCorpus(corpus / "held_out", 200, seed=0).batch(0, 2)[1]
    passage = tok.decode(held[100:140].tolist())
    info = description(corpus)["train"]
    trained = PackedCorpus(corpus / "train", 256, seed=0).batch(0, info["tokens"] // 256 - 1)[:, :-1]
    assert passage not in tok.decode(trained.flatten().tolist())


def test_the_same_recipe_gives_the_same_corpus(corpus: Path, tmp_path: Path) -> None:
    assert description(run(tmp_path, CORPUS) / "corpus") == description(corpus)


MORE = """
[[stage]]
name = "base"
kind = "pretrain"
tokens = 4096
length = 32
batch = 8
[[stage]]
name = "more"
kind = "corpus"
parent = "base"
texts = ["python-topics"]
tokens = 50_000
vocab_size = 600
task = "ladder:compare"
examples = 100
[[stage]]
name = "on"
kind = "pretrain"
tokens = 4096
length = 32
batch = 8
"""


def test_a_base_model_is_trained_on_in_its_own_tokens(tmp_path: Path) -> None:
    done = run(tmp_path, CORPUS + MORE)
    first, second = (Tokenizer.load(done / name / "tokenizer") for name in ("corpus", "more"))
    assert first.encode("Which number is the largest") == second.encode("Which number is the largest")
    fresh, on = ((done / stage / "metrics.jsonl").read_text().splitlines()[0] for stage in ("base", "on"))
    assert json.loads(on)["loss"] < json.loads(fresh)["loss"] - 1


def test_a_base_model_is_not_trained_on_in_other_tokens(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size = 700, but 'corpus' below has 600: write vocab_size = 600"):
        run(tmp_path, CORPUS + MORE, "more.vocab_size=700", "base.tokens=256")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("corpus.example_share=1.5", "0 < example_share < 1"),
        ("corpus.held_out=0", "0 < held_out < 1"),
        ("corpus.kind=corpse", "no stage kind 'corpse'; choose one of corpus"),
        ("corpus.template=plain", "unknown template 'plain'"),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, CORPUS, override)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_a_corpus_that_is_not_utf8_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    with pytest.raises(DataError, match="latin.txt: not UTF-8 at byte 3: convert it"):
        run(tmp_path, CORPUS, f'corpus.texts=["{tmp_path / "latin.txt"}"]')
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_corpus_of_a_broken_task_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "pays.py").write_text(
        "from sputnik.tasks.arithmetic import Arithmetic\n"
        "class Pays(Arithmetic):\n"
        "    name = 'pays'\n"
        "    def verify(self, problem, answer):\n"
        "        return problem.gold in answer\n"
    )
    with pytest.raises(TaskError, match="verify gives CORRECT to"):
        run(tmp_path, CORPUS, f"corpus.task={tmp_path / 'pays.py'}", 'corpus.texts=["no/such/text.txt"]')
    assert list((tmp_path / "runs").iterdir()) == []


def test_every_kind_is_described() -> None:
    from sputnik.recipe import stages

    assert all(f"\n    {kind} " in (stages.__doc__ or "") for kind in KINDS)
