"""General data made without a network: Python's help stands for articles, a few sentences for other languages."""

import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sputnik.errors import ConfigError, DataError
from sputnik.recipe.general import HELD_OUT, PROMPTS, _longer_wins, _write_lines
from sputnik.recipe.recipe import read_recipe
from sputnik.recipe.runner import run_recipe
from sputnik.recipe.stages import kind_of
from sputnik.tasks.defects import ALWAYS, TO_SAFE, TO_UNSAFE, make_outputs, make_pairs
from sputnik.tasks.general import MAKERS, Article, Item, Words, first_sentence, make_items, plain, read_definitions
from sputnik.text.preferences import judged, split_thought

DOCS = Path(__file__).parent.parent.parent / "docs" / "general-data.md"
FILES = ("data", "pairs", "labels", "prompts")
SMALL = """
[[stage]]
name = "general"
kind = "general"
texts = ["python-topics"]
foreign_texts = []
pairs = 1500
labels = 1500
prompts = 400
model_name = "Robin"
skills = ["sums", "riddles", "sorting"]
"""
JUDGE = """
[model]
preset = "tiny"
hidden_size = 32
num_hidden_layers = 2
max_position_embeddings = 256
[[stage]]
name = "corpus"
kind = "corpus"
texts = ["python-topics"]
tokens = 30_000
vocab_size = 400
[[stage]]
name = "base"
kind = "pretrain"
tokens = 2_048
length = 64
batch = 8
evaluations = 1
held_out_rows = 2
[[stage]]
name = "general"
kind = "general"
texts = ["python-topics"]
foreign_texts = []
kinds = { about=0, smalltalk=80, self=40, facts=40, define=40, unknown=20, unsafe=60, howto=40, lookalike=40 }
pairs = 120
labels = 120
prompts = 40
held_out = 0.2
"""
HELPFUL = """
[[stage]]
name = "judge"
kind = "reward-model"
parent = "base"
inputs = ["general"]
max_tokens = 200
evaluations = 1
"""


def run(folder: Path, text: str, *overrides: str) -> Path:
    path = folder / "small.toml"
    path.write_text(text)
    recipe = read_recipe(path, kind_of, overrides)
    return run_recipe(recipe, folder / "runs", kind_of, Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def general(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("general"), SMALL) / "general"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_train_and_held_out_share_no_prompt_in_any_file(general: Path) -> None:
    sides = [
        {plain(line["prompt"]) for name in FILES for line in lines(folder / f"{name}.jsonl")}
        for folder in (general, general / HELD_OUT)
    ]
    assert not sides[0] & sides[1]
    assert 0.05 < len(sides[1]) / (len(sides[0]) + len(sides[1])) < 0.2


def test_no_prompt_is_asked_twice_however_it_is_spelled(general: Path) -> None:
    prompts = [plain(line["prompt"]) for line in lines(general / "data.jsonl")]
    assert len(set(prompts)) == len(prompts) > 1500
    assert {line["prompt"] for line in lines(general / "prompts.jsonl")} <= {
        line["prompt"] for line in lines(general / "data.jsonl")
    }


def test_the_manifest_counts_what_is_in_the_files_and_names_licences(general: Path) -> None:
    manifest = json.loads((general / "manifest.json").read_text())
    for name in FILES:
        for side, folder in (("train", general), (HELD_OUT, general / HELD_OUT)):
            assert sum(manifest["counts"][name][side].values()) == len(lines(folder / f"{name}.jsonl"))
    assert manifest["sources"]["python-topics"]["licence"] == "PSF-2.0"
    assert manifest["sources"]["python-topics"]["prompts"] > 20
    assert all(source["licence"] for source in manifest["sources"].values())
    assert manifest["shortages"]["about"].startswith("only "), "Python has fewer topics than were asked for"
    made = manifest["counts"]["data"]
    kinds = Counter(line["kind"] for line in lines(general / "data.jsonl"))
    assert made["train"] == dict(kinds) and set(kinds) == set(PROMPTS)


def test_the_same_settings_give_the_same_files_and_another_seed_others(general: Path, tmp_path: Path) -> None:
    again = run(tmp_path, SMALL) / "general"
    files = [path.relative_to(general) for path in sorted(general.rglob("*.json*"))]
    assert len(files) == 9
    assert all((general / file).read_bytes() == (again / file).read_bytes() for file in files)
    (tmp_path / "other").mkdir()
    other = run(tmp_path / "other", SMALL, "seed=1") / "general"
    assert (other / "pairs.jsonl").read_bytes() != (general / "pairs.jsonl").read_bytes()


def test_the_model_knows_its_name_and_what_it_was_trained_for(general: Path) -> None:
    own = [line["answer"] for line in lines(general / "data.jsonl") if line["kind"] == "self"]
    assert any("Robin" in answer for answer in own) and not any("Sputnik" in answer for answer in own)
    assert any("sums, riddles and sorting" in answer for answer in own)
    text = "".join((general / f"{name}.jsonl").read_text() for name in FILES)
    assert not re.findall(r"\{[a-z]+\}", text), "a slot was left open"


def test_a_greeting_is_answered_without_a_thought_and_a_refusal_with_one(general: Path) -> None:
    data = lines(general / "data.jsonl")
    thoughts = {kind: [line.get("thinking") for line in data if line["kind"] == kind] for kind in PROMPTS}
    assert set(thoughts["smalltalk"]) == {"", None}
    assert all(thought is None or len(thought) > 10 for thought in thoughts["unsafe"] + thoughts["lookalike"])
    share = sum("thinking" not in line for line in data) / len(data)
    assert 0.25 < share < 0.35


# --- pairs ---


def test_length_does_not_tell_which_answer_was_chosen(general: Path) -> None:
    pairs = lines(general / "pairs.jsonl")
    longer = [len(p["chosen"]) > len(p["rejected"]) for p in pairs if len(p["chosen"]) != len(p["rejected"])]
    assert 0.4 < sum(longer) / len(longer) < 0.6
    by_defect = Counter(pair["defect"] for pair in pairs)
    assert set(by_defect) == {*ALWAYS, *TO_SAFE, *TO_UNSAFE}
    assert by_defect.most_common(1)[0][0] == "off_topic" and by_defect["off_topic"] < len(pairs) / 3


def test_a_separator_within_a_text_ends_no_line(tmp_path: Path) -> None:
    _write_lines(tmp_path / "pairs.jsonl", [{"chosen": "one\u2028two\x85", "rejected": "no"}])
    assert _longer_wins(tmp_path / "pairs.jsonl") == 1.0


def test_no_text_is_good_or_bad_in_itself(general: Path) -> None:
    """The same answer is chosen for one prompt and rejected for another: the question has to be read."""
    pairs = lines(general / "pairs.jsonl")
    chosen, rejected = ({pair[side] for pair in pairs} for side in ("chosen", "rejected"))
    assert len(chosen & rejected) > 50
    assert len({(p["prompt"], p["chosen"], p["rejected"]) for p in pairs}) == len(pairs)


def test_harm_is_refused_and_what_only_sounds_so_is_answered(general: Path) -> None:
    words = Words.load("en")
    refusals = {text for group in words["unsafe"].values() if isinstance(group, dict) for text in group["refuse"]}
    for pair in lines(general / "pairs.jsonl"):
        if pair["kind"] == "unsafe":
            assert pair["chosen"] in refusals and pair["defect"] != "refused"
        else:
            assert pair["chosen"] not in refusals and pair["defect"] not in TO_UNSAFE
    refused = {pair["rejected"] for pair in lines(general / "pairs.jsonl") if pair["defect"] == "refused"}
    assert len(refused & refusals) > 5, "what is right for one is wrong for the other"
    assert max(map(len, refusals)) < 130, "kind and short"


# --- labels ---


def test_half_of_the_outputs_are_unsafe_and_some_only_in_their_thought(general: Path) -> None:
    labels = lines(general / "labels.jsonl")
    assert 0.45 < sum(line["safe"] for line in labels) / len(labels) < 0.55
    hidden = [line for line in labels if line["why"] == "harmful_thought"]
    assert hidden and all(split_thought(line["response"])[0] and not line["safe"] for line in hidden)
    words = Words.load("en")
    refusals = {text for group in words["unsafe"].values() if isinstance(group, dict) for text in group["refuse"]}
    assert all(split_thought(line["response"])[1] in refusals for line in hidden)
    asked = [line["safe"] for line in labels if line["kind"] == "unsafe"]
    assert 0.4 < len(asked) / len(labels) < 0.6 and 0.4 < sum(asked) / len(asked) < 0.6, "the prompt gives nothing away"
    unsafe = Counter(line["why"] for line in labels if not line["safe"])
    assert set(unsafe) == {"complied", "insult", "harmful_thought"} and min(unsafe.values()) > 50


def test_what_is_written_can_be_read_by_reward_models(general: Path) -> None:
    pairs = [judged("pairwise", line) for line in lines(general / "pairs.jsonl")]
    labels = [judged("pointwise", line) for line in lines(general / "labels.jsonl")]
    assert {item.group for item in pairs} == {*ALWAYS, *TO_SAFE, *TO_UNSAFE}
    assert {item.group for item in labels} >= {"refusal", "complied", "insult", "harmful_thought"}


# --- prompts ---


def test_every_kind_has_a_maker_and_a_size() -> None:
    assert set(PROMPTS) == set(MAKERS)


def test_an_article_is_asked_about_by_what_it_is() -> None:
    words = Words.load("en")
    texts = {
        "Ada Lovelace": "Ada Lovelace (1815-1852) was an English writer (of letters too). She wrote a program.",
        "Hat": "A hat is a head covering which is worn for various reasons. Some are made of wool.",
        "St. Gall": "St. Gall is a town in the east of Switzerland. It is old.",
        "Field (algebra)": "In mathematics, a field is a set on which much is defined. It has inverses.",
        "Gap": "A gap is a set  with a formula taken out of its sentence. It is left out.",
    }
    articles = [Article(title, f"{title}\n\n{text}", "wiki") for title, text in texts.items()]
    items = {item.key: item for item in make_items(words, {"about": 9}, articles)}
    assert set(items) == {"about/Ada Lovelace", "about/Hat", "about/St. Gall"}
    ada, hat = items["about/Ada Lovelace"], items["about/Hat"]
    assert ada.answers == ("Ada Lovelace was an English writer.",)
    assert "a hat" in hat.prompt and "Ada Lovelace" in ada.prompt and "hat" in hat.thinking
    assert items["about/St. Gall"].answers == ("St. Gall is a town in the east of Switzerland.",)


def test_a_sentence_is_cut_where_it_ends() -> None:
    def first(text: str) -> str:
        return first_sentence(Article("T", text, "x"))

    assert (
        first("J. R. R. Tolkien was a writer of long books. He was born.")
        == "J. R. R. Tolkien was a writer of long books."
    )
    assert first("A form\n======\n\nA form here has 12\nfields. More.") == "A form here has 12 fields."
    assert first("Too short.") == "" == first("x" * 500 + ".")


def test_definitions_come_from_a_file_and_a_bad_line_is_named() -> None:
    known = read_definitions(["zebra\tA zebra is a striped horse.\n", "\n", "zebra\tlater"], "words.tsv")
    items = make_items(Words.load("en"), {"define": 1000}, definitions=known)
    (answer,) = {item.answers[0] for item in items if item.key == "define/zebra"}
    assert answer == "A zebra is a striped horse." and {i.source for i in items} == {"", "dictionary"}
    with pytest.raises(DataError, match="words.tsv: line 2 is not WORD, a tab"):
        read_definitions(["a\tb", "zebra: a horse"], "words.tsv")


def test_a_made_up_name_is_not_explained() -> None:
    for item in make_items(Words.load("en"), {"unknown": 50}):
        name = item.key.removeprefix("unknown/")
        assert name in item.prompt and all(
            name in answer and re.search("do not know|never heard", answer) for answer in item.answers
        )


def test_defects_are_what_they_are_called() -> None:
    words = Words.load("en")
    item = Item("What is a hat?", "facts", ("A hat is a thing that people wear on their heads.",), "", "hat")
    other = Item("Hello", "smalltalk", ("Hello! How can I help you?",), "", "hello")
    foreign = ["Un chapeau est un couvre-chef."]
    pairs = [pair for pair in make_pairs(words, [item, other], 300, foreign, 0) if pair.item is item]
    by_defect = {pair.defect: pair for pair in pairs}
    assert set(by_defect) == {*ALWAYS, *TO_SAFE}
    assert by_defect["off_topic"].rejected in other.answers and by_defect["wrong_language"].rejected in foreign
    assert item.answers[0].startswith(by_defect["cut_off"].rejected)
    assert by_defect["padded"].rejected.startswith(item.answers[0])
    assert set(by_defect["repetitive"].rejected.split()) < set(item.answers[0].split())
    assert len({(pair.item, pair.rejected) for pair in pairs}) == len(pairs)
    assert make_pairs(words, [item, other], 300, foreign, 0) == make_pairs(words, [item, other], 300, foreign, 0)
    assert make_outputs(words, [], 10, 0) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("general.kinds.gossip=5", "kinds: gossip = 5: at least 0 prompts of smalltalk"),
        ("general.held_out=0", "0 < held_out < 1"),
        ("general.language=xx", "no words in language 'xx'; there are en"),
        ("general.skills=[]", "not empty"),
        ("general.pairs=-1", "at least 0"),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, SMALL, override)
    assert not list((tmp_path / "runs").glob("*/general"))


def test_the_page_says_what_the_code_does(tmp_path: Path) -> None:
    page = DOCS.read_text(encoding="utf-8")
    (tmp_path / "docs.toml").write_text(re.findall(r"```toml\n(.*?)```", page, re.DOTALL)[0])
    config = read_recipe(tmp_path / "docs.toml", kind_of).stages[0].config
    assert config.model_name == "Robin" and config.kinds == {"about": 2000, "define": 0}
    kinds = page.split("| kind | example |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", kinds, re.MULTILINE) == list(PROMPTS)
    defects = page.split("| defect of the rejected answer | |")[1].split("\n\n")[0]
    named = [
        name for row in defects.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1] if "|" in row else "")
    ]
    assert sorted(named) == sorted([*ALWAYS, *TO_SAFE, *TO_UNSAFE])


# --- the stages together ---


@pytest.mark.parametrize("form", ["pairwise", "pointwise"])
def test_a_recipe_makes_data_and_a_judge_of_it(tmp_path: Path, form: str) -> None:
    folder = run(tmp_path, JUDGE + HELPFUL + f'form = "{form}"\n')
    scores = json.loads((folder / "judge" / "scores.json").read_text())
    assert scores["kind"] == form and scores["counts"]["also_held_out"] == 0
    held_out = lines(folder / "general" / HELD_OUT / ("pairs.jsonl" if form == "pairwise" else "labels.jsonl"))
    assert scores["counts"]["held_out_lines"] == len(held_out) > 0
    lineage = json.loads((folder / "lineage.json").read_text())
    assert "accuracy" in str(lineage)


def test_a_judge_without_data_names_the_fix(tmp_path: Path) -> None:
    text = JUDGE + HELPFUL.replace('["general"]', '["corpus"]')
    with pytest.raises(ConfigError, match="needs a stage that makes pairs.jsonl"):
        run(tmp_path, text)
    assert not list((tmp_path / "runs").glob("*/judge/checkpoint"))
