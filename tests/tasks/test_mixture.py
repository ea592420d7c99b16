"""A mixture is its families: their splits, ids, verdicts and worked examples, in the shares of the weights."""

import dataclasses
import json
import re
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sputnik.errors import ConfigError, TaskError
from sputnik.tasks.base import Split, Verdict, best_constant, judge, load_task, normalised, self_check
from sputnik.tasks.verify import VerifierPool

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "my_task.py")
FAMILIES: list[dict[str, Any]] = [
    {"task": "arithmetic", "weight": 3.0, "options": {"terms": [2, 3]}},
    {"task": "countdown", "weight": 1},
    {"task": EXAMPLE, "weight": 0.5, "options": {"largest": 500}},
]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def mix(*families: dict[str, Any]) -> Any:
    return load_task("mix", {"families": list(families or FAMILIES)})


@pytest.mark.parametrize("split", SPLITS)
def test_questions_keep_the_id_and_the_split_they_have_alone(split: Split) -> None:
    alone = {}
    for row in FAMILIES:
        task = load_task(row["task"], row.get("options", {}))
        alone[task.name] = {each.id: each for each in task.problems(split, 60, seed=3)}
    for problem in mix().problems(split, 60, seed=3):
        same = alone[problem.meta["family"]][problem.id]
        assert (problem.prompt, problem.gold) == (same.prompt, same.gold)
        assert {key: value for key, value in problem.meta.items() if key != "family"} == same.meta


def test_no_two_questions_share_an_id_and_no_split_another_ones() -> None:
    ids = [{problem.id for problem in mix().problems(split, 150)} for split in SPLITS]
    assert list(map(len, ids)) == [150] * 3 and len(set.union(*ids)) == 450


@pytest.mark.parametrize("n", [9, 45, 900])
def test_shares_follow_the_weights_whatever_the_number(n: int) -> None:
    counts = Counter(problem.meta["family"] for problem in mix().problems("train", n, seed=n))
    for name, weight in (("arithmetic", 3), ("countdown", 1), ("roman", 0.5)):
        assert abs(counts[name] - n * weight / 4.5) <= 3, counts


def test_a_family_of_little_weight_comes_up_over_many_small_draws() -> None:
    task = mix({"task": "arithmetic", "weight": 15}, {"task": "countdown"})
    drawn = Counter(problem.meta["family"] for seed in range(160) for problem in task.problems("train", 4, seed))
    assert 25 <= drawn["countdown"] <= 55  # 40 of 640 expected


def test_same_seed_same_problems_other_seed_others() -> None:
    assert mix().problems("train", 50, 3) == mix().problems("train", 50, 3)
    assert mix().problems("train", 50, 3) != mix().problems("train", 50, 4)


def test_each_question_is_judged_voted_and_concluded_by_its_own_family() -> None:
    task = mix()
    with VerifierPool("mix", {"families": FAMILIES}) as pool:
        problems = task.problems("test", 40)
        found = pool.verify([(problem, said) for problem in problems for said in (problem.gold, "The answer is 7x.")])
        assert best_constant(problems, pool.verify).accuracy < 0.2
    assert {judgement.verdict for judgement in found[::2]} == {Verdict.CORRECT}
    assert {judgement.verdict for judgement in found[1::2]} == {Verdict.UNPARSEABLE}
    for problem in problems:
        said = task.conclude(problem, problem.gold)
        assert said == f"The answer is {problem.gold}."
        assert judge(task, problem, said).verdict is Verdict.CORRECT
    sums = next(problem for problem in problems if problem.meta["family"] == "arithmetic")
    games = next(problem for problem in problems if problem.meta["family"] == "countdown")
    assert normalised(task, sums, "+07") == "7" and normalised(task, games, "2*(1+3)") == "8 from [1, 2, 3]"
    assert task.self_checks("Wait, not 3.") and not task.self_checks("A guess.")


def test_the_self_check_tries_every_family_however_small_its_weight(tmp_path: Path) -> None:
    cheat = tmp_path / "cheat.py"
    cheat.write_text(
        "from sputnik.tasks.arithmetic import Arithmetic\n"
        "class Cheat(Arithmetic):\n"
        "    name = 'cheat'\n"
        "    def verify(self, problem, answer):\n"
        "        return problem.gold in answer\n"
    )
    self_check(mix())
    bad = {"families": [{"task": "arithmetic", "weight": 1e6}, {"task": str(cheat), "weight": 1e-6}]}
    with pytest.raises(TaskError, match="task 'cheat': verify gives CORRECT to"), VerifierPool("mix", bad) as pool:
        self_check(load_task("mix", bad), verify=pool.verify)


def test_a_tolerance_is_that_of_its_family_alone(tmp_path: Path) -> None:
    lenient = tmp_path / "lenient.py"
    lenient.write_text(
        "from sputnik.tasks.arithmetic import Arithmetic\n"
        "class Lenient(Arithmetic):\n"
        "    name = 'lenient'\n"
        "    tolerates = ('sentence',)\n"
        "    def verify(self, problem, answer):\n"
        "        return answer.strip().removesuffix(', I think') == problem.gold\n"
    )
    self_check(mix({"task": str(lenient)}, {"task": "arithmetic"}))
    strict = tmp_path / "strict.py"
    strict.write_text(lenient.read_text().replace("lenient", "strict").replace("('sentence',)", "()"))
    with pytest.raises(TaskError, match="task 'strict'.*attack 'sentence'"):
        self_check(mix({"task": str(lenient)}, {"task": str(strict)}))


def test_demonstrations_are_mixed_and_named() -> None:
    shown = mix(*FAMILIES[:2]).demonstrations(200, seed=1)
    counts = Counter(each.style.split(":")[0] for each in shown)
    assert counts == {"arithmetic": 150, "countdown": 50}
    assert {each.style.split(":")[0] for each in shown[:20]} == set(counts)
    assert shown == mix(*FAMILIES[:2]).demonstrations(200, seed=1)
    with pytest.raises(TaskError, match="'roman' has no demonstrations"):
        mix().demonstrations(200, seed=1)


def test_a_small_family_gives_all_it_has_and_the_others_go_on() -> None:
    small = {"task": "arithmetic", "name": "small", "options": {"terms": [2, 2], "largest": 4}}  # 32 in all
    counts = Counter(problem.meta["family"] for problem in mix(small, FAMILIES[1]).problems("train", 300))
    alone = len(
        {problem.id for problem in load_task("arithmetic", small["options"]).problems("train", counts["small"])}
    )
    assert 15 < counts["small"] == alone and counts["countdown"] == 300 - alone
    with pytest.raises(TaskError, match=f"only {alone} distinct train"):
        load_task("arithmetic", small["options"]).problems("train", alone + 1)


def write_file(path: Path, count: int) -> str:
    path.write_text("\n".join(json.dumps({"prompt": f"{path.stem} {n}?", "answer": n}) for n in range(count)))
    return f"math:{path}"


def test_a_short_file_ends_and_the_others_go_on(tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    file = write_file(tmp_path / "few.jsonl", 20)
    task = mix({"task": "arithmetic"}, {"task": file})
    counts = Counter(problem.meta["family"] for problem in task.problems("train", 100))
    assert counts["math"] == len(load_task(file).problems("train", counts["math"])) > 8
    assert counts["arithmetic"] == 100 - counts["math"]


def test_a_family_without_questions_in_a_split_is_an_error_not_a_gap(tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    file = write_file(tmp_path / "few.jsonl", 20)
    task = mix({"task": "arithmetic"}, {"task": file, "options": {"benchmark": True}})
    assert len(task.problems("test", 30)) == 30
    with pytest.raises(TaskError, match="family 'math' has no train problems; leave it out here"):
        task.problems("train", 10)
    self_check(task)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ConfigError, "needs options families"),
        ({"families": []}, ConfigError, "needs options families"),
        ({"familes": []}, ConfigError, "did you mean 'families'"),
        ({"families": FAMILIES, "options": 3}, ConfigError, "options is a table"),
        ({"families": ["arithmetic"]}, ConfigError, "family 1: write a table with a task"),
        ({"families": [{"weight": 1}]}, ConfigError, "family 1.*task"),
        ({"families": [{"task": "arithmetic", "wieght": 1}]}, ConfigError, "family 1.*did you mean 'weight'"),
        ({"families": [{"task": "arithmetic", "weight": 0}]}, ConfigError, "weight = 0.0: set it above 0"),
        ({"families": [{"task": "arithmetic"}, {"task": "sums"}]}, TaskError, "unknown task 'sums'"),
        ({"families": [{"task": "arithmetic"}] * 2}, ConfigError, "two families are called 'arithmetic'"),
        ({"families": [{"task": "mix", "options": {"families": FAMILIES}}]}, ConfigError, "cannot hold a mixture"),
    ],
)
def test_wrong_options_are_one_line_with_the_fix(options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        load_task("mix", options)
    assert "\n" not in str(caught.value)


def test_one_task_may_come_twice_under_two_names_and_two_tasks_not_under_one(tmp_path: Path) -> None:
    short = {"task": "arithmetic", "name": "short", "options": {"terms": [2, 2]}}
    long = {"task": "arithmetic", "name": "long", "options": {"terms": [6, 8]}}
    problems = mix(short, long).problems("train", 40)
    assert {problem.meta["family"]: len(problem.meta["words"]) > 3 for problem in problems} == {
        "short": False,
        "long": True,
    }
    text = Path(EXAMPLE).read_text()
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match="two different tasks call themselves 'roman'"):
        mix({"task": str(tmp_path / "a.py"), "name": "a"}, {"task": str(tmp_path / "b.py"), "name": "b"})


def test_the_mixture_of_the_docs_loads() -> None:
    page = (Path(EXAMPLE).parents[1] / "docs" / "tasks.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```toml\n(task = \"mix\".*?)```", page, re.DOTALL)
    settings = tomllib.loads(block)
    for row in settings["task_options"]["families"]:
        row["task"] = row["task"].replace("examples/my_task.py", EXAMPLE)
    task = load_task(settings["task"], settings["task_options"])
    assert {problem.meta["family"] for problem in task.problems("test", 20)} == {"arithmetic", "countdown", "roman"}


def test_shared_options_are_those_of_every_family_that_has_none_of_its_own() -> None:
    families = [{"task": "ladder:sort", "options": {"count": [3, 3]}}, {"task": "ladder:compare"}]
    mixed = load_task("mix", {"families": families, "options": {"count": [2, 2], "largest": 50}})
    sort, compare = (member.task for member in mixed.members.values())
    assert (sort.count, compare.count, sort.largest, compare.largest) == ((3, 3), (2, 2), 50, 50)


def test_a_share_of_the_questions_is_asked_in_other_words() -> None:
    families = [{"task": "arithmetic"}, {"task": "ladder:sort"}]
    plain, other = (load_task("mix", {"families": families, "reworded": share}) for share in (0.0, 0.3))
    before, after = (task.problems("train", 400, seed=2) for task in (plain, other))
    assert [(each.id, each.gold, each.meta) for each in before] == [(each.id, each.gold, each.meta) for each in after]
    changed = [(old, new) for old, new in zip(before, after) if old.prompt != new.prompt]
    assert 80 <= len(changed) <= 160
    assert all(new.prompt in plain.wordings(old) for old, new in changed)
    again = {each.id: each.prompt for each in other.problems("train", 400, seed=5)}
    assert all(again.get(each.id, each.prompt) == each.prompt for each in after)  # by the question alone
    self_check(other)


def test_worked_examples_are_reworded_too() -> None:
    families = [{"task": "arithmetic"}, {"task": "ladder:sort"}]
    plain, other = (
        load_task("mix", {"families": families, "reworded": share}).demonstrations(400, 1) for share in (0.0, 0.5)
    )
    assert [dataclasses.replace(each, prompt="") for each in plain] == [
        dataclasses.replace(each, prompt="") for each in other
    ]
    changed = [(old, new) for old, new in zip(plain, other) if old.prompt != new.prompt]
    assert 150 <= len(changed) <= 250 and all(new.prompt in old.wordings for old, new in changed)


@pytest.mark.parametrize(
    ("families", "share", "message"),
    [
        ([{"task": "arithmetic"}], 1.5, "reworded = 1.5: a share of the questions, from 0 to 1"),
        ([{"task": "arithmetic"}], "much", "a share of the questions"),
        ([{"task": "countdown"}], 0.3, "know their questions in one wording only"),
    ],
)
def test_a_share_that_cannot_be_is_refused(families: list[dict[str, Any]], share: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_task("mix", {"families": families, "reworded": share})
