from pathlib import Path

import pytest

from sputnik.errors import ConfigError, TaskError
from sputnik.tasks.base import Verdict, judge, load_task, self_check
from sputnik.tasks.verify import VerifierPool

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "my_task.py")
GOOD = """
from sputnik.tasks.base import Problem, Task

class Echo(Task):
    name = "echo"
    def generate(self, rng):
        number = rng.randrange(10**6)
        return Problem(prompt=f"say {number}", gold=str(number))
    def verify(self, problem, answer):
        return answer == problem.gold
"""


def test_the_example_task_works_from_its_file_alone() -> None:
    task = load_task(EXAMPLE, {"largest": 500})
    self_check(task)
    problems = task.problems("test", 50)
    assert max(int(problem.prompt.split()[1]) for problem in problems) <= 500
    with VerifierPool(EXAMPLE, {"largest": 500}) as pool:
        found = pool.verify([(problem, answer) for problem in problems for answer in (problem.gold, "M", "4")])
    assert [judgement.verdict for judgement in found] == [Verdict.CORRECT, Verdict.WRONG, Verdict.UNPARSEABLE] * 50


def test_the_example_task_gives_the_class_by_name_too() -> None:
    assert load_task(f"{EXAMPLE}:Roman").name == "roman"
    with pytest.raises(TaskError, match="no Task subclass 'Greek'; found: Roman"):
        load_task(f"{EXAMPLE}:Greek")


def test_an_unknown_option_of_a_user_task_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'largest'"):
        load_task(EXAMPLE, {"larges": 3})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import nothing_of_this_name", "task.py:1: import raised ModuleNotFoundError"),
        ("def f(:\n  pass", "task.py:1: import raised SyntaxError"),
        ("x = 1", "found: none"),
        (f"{GOOD}    x: list = []\nimport dataclasses as d\nd.dataclass(Echo)", "task.py:13: import raised ValueError"),
        (f"{GOOD}    def __init__(self, size): pass", "task.py: Echo raised TypeError: .*'size'"),
        (GOOD + GOOD.replace("Echo", "Other"), "name one of its Task subclasses as .*found: Echo, Other"),
        (GOOD.replace('"echo"', '""'), "give class Echo a `name`"),
        (GOOD.replace("    def verify(self, problem, answer):\n        return answer == problem.gold\n", ""), "verify"),
    ],
)
def test_a_file_that_cannot_be_a_task_is_one_line_with_the_place(source: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "task.py"
    path.write_text(source)
    with pytest.raises(TaskError, match=message) as caught:
        load_task(str(path))
    assert "\n" not in str(caught.value)


def test_generate_and_verify_that_raise_name_the_users_line(tmp_path: Path) -> None:
    path = tmp_path / "task.py"
    path.write_text(GOOD.replace("return answer == problem.gold", "return int(answer) == int(problem.gold)"))
    task = load_task(str(path))
    problem = task.problems("train", 1)[0]
    judgement = judge(task, problem, "x")
    assert judgement.verdict == Verdict.ERROR
    assert judgement.detail.startswith(f"{path}:10: Echo.verify raised ValueError: invalid literal")

    path.write_text(GOOD.replace("rng.randrange(10**6)", "rng.choice([])"))
    with pytest.raises(TaskError, match=r"task.py:7: Echo.generate raised IndexError"):
        load_task(str(path)).problems("train", 1)

    path.write_text(GOOD.replace("return Problem(", "return str("))
    with pytest.raises(TaskError, match=r"task.py:8: Echo.generate raised TypeError"):
        load_task(str(path)).problems("train", 1)


def test_two_files_of_one_name_do_not_mix(tmp_path: Path) -> None:
    for folder, gold in (("a", "1"), ("b", "2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "task.py").write_text(GOOD.replace("gold=str(number)", f'gold="{gold}"'))
    first, second = (load_task(str(tmp_path / folder / "task.py")) for folder in "ab")
    assert first.problems("train", 1)[0].gold == "1"
    assert second.problems("train", 1)[0].gold == "2"


def test_the_docs_show_the_example_as_it_is() -> None:
    source = Path(EXAMPLE).read_text()
    shown = source[source.index("@dataclass(frozen=True)\nclass Roman") :]
    assert shown in (Path(EXAMPLE).parents[1] / "docs" / "tasks.md").read_text()
