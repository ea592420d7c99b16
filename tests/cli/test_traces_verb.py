"""`sputnik traces`: a checkpoint or a teacher behind a URL in, a file of examples out, what was not taken beside it."""

import inspect
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from sputnik.__main__ import main
from sputnik.cli.traces import TracesVerbConfig
from sputnik.recipe.recipe import read_recipe
from sputnik.recipe.stages import kind_of
from sputnik.tasks.base import Verdict
from sputnik.text import quality
from sputnik.text.tokenizer import Tokenizer
from sputnik.train import selection, traces
from sputnik.train.examples import read_examples

pytestmark = pytest.mark.timeout(300)


class Teacher(BaseHTTPRequestHandler):
    """Works sums out; now and then it is wrong, or thinks in Chinese."""

    server: "School"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        question = body["messages"][0]["content"]
        self.server.asked.append(question)
        number, terms = len(self.server.asked), re.search(r"What is ([-+0-9]+)\?", question)
        assert terms is not None
        value = eval(terms[1]) + (number % 4 == 0)
        thought = "首先把两个数加起来" if number % 4 == 1 else f"I take {terms[1]}, that is {value}. Sample {number}."
        message = {"role": "assistant", "content": f"The answer is {value}.", "reasoning_content": thought}
        answer = {"choices": [{"message": message, "finish_reason": "stop"}]}
        answer["usage"] = {"prompt_tokens": 9, "completion_tokens": 21}  # type: ignore[assignment]
        raw = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: Any) -> None:
        pass


class School(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Teacher)
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


@pytest.fixture()
def school() -> Iterator[School]:
    pytest.importorskip("httpx2")
    with School() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_teacher_behind_a_url_gives_examples_that_fine_tuning_reads(
    school: School, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "teacher.jsonl"
    flags = ["--task", "arithmetic", "--questions", "10", "--samples", "4", "--keep", "2"]
    flags += ["--instruction", "Be brief.", "--endpoint.model", "wise", "--endpoint.concurrency", "1"]
    assert main(["traces", school.url, *flags, "--out", str(out)]) == 0
    assert len(school.asked) == 40 and all(question.endswith("?\nBe brief.") for question in school.asked)
    kept, rejected = read(out), read(tmp_path / "new" / "teacher.jsonl.traces" / "rejected.jsonl")
    assert len(kept) == 20 and {line["reason"] for line in rejected} == {"wrong", "language"}
    for line in kept:
        assert line["answer"] == f"The answer is {eval(line['prompt'].removeprefix('What is ').removesuffix('?'))}."
        assert line["thinking"].startswith("I take") and line["length"] == 21
    tok = Tokenizer.train(["What is 1 + 2? The answer is 3."] * 4, vocab_size=400)
    assert len(read_examples([out], tok, longest=10_000).examples) == 20
    said = capsys.readouterr().out
    assert "20 of 40 samples of 10 questions" in said and "language 10" in said and "completion_tokens 840" in said
    before = out.read_bytes()
    assert main(["traces", school.url, *flags, "--out", str(out)]) == 0
    assert len(school.asked) == 40 and out.read_bytes() == before, "nobody is asked twice"


def test_your_own_questions_and_answers(school: School, tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    mine = tmp_path / "mine.jsonl"
    mine.write_text("\n".join(json.dumps({"prompt": f"What is {n}+{n}?", "answer": 2 * n}) for n in range(1, 15)))
    out = tmp_path / "out.jsonl"
    flags = ["--endpoint.model", "wise", "--questions", "8", "--samples", "4", "--out", str(out)]
    assert main(["traces", school.url, "--task", f"math:{mine}", *flags]) == 0
    assert 4 <= len(read(out)) == len({line["prompt"] for line in read(out)}) <= 8


def test_a_model_that_gets_nothing_right_is_an_error_with_the_reason_and_leaves_no_file(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "none.jsonl"
    flags = ["--task", "arithmetic", "--questions", "4", "--samples", "2", "--max-tokens", "8", "--out", str(out)]
    assert main(["traces", str(checkpoint), *flags]) == 2
    assert re.search(r"error: no trace was kept of 8 samples \(.*\): ", capsys.readouterr().err)
    assert not out.exists() and len(read(tmp_path / "none.jsonl.traces" / "rejected.jsonl")) == 8


def test_a_file_that_is_there_already_is_not_written_over(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine.jsonl"
    out.write_text("mine")
    assert main(["traces", str(checkpoint), "--task", "arithmetic", "--out", str(out)]) == 2
    assert "is there already and was not made here" in capsys.readouterr().err
    assert out.read_text() == "mine" and list(tmp_path.iterdir()) == [out]
    assert main(["traces", str(tmp_path / "no model"), "--task", "arithmetic", "--out", str(tmp_path / "x")]) == 2
    assert list(tmp_path.iterdir()) == [out]


def test_flags_become_settings() -> None:
    config = TracesVerbConfig(
        "m", "mix", Path("x"), option=('families=[{task="arithmetic"}]',), readable=("repeats=0.5",)
    )
    settings = config.settings()
    assert settings.task_options == {"families": [{"task": "arithmetic"}]} and settings.readable == {"repeats": 0.5}
    assert settings.url == "" and settings.endpoint == {}


def test_a_stage_of_a_recipe_and_the_one_of_the_docs(school: School, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "traces.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[[stage]]\nname = "zero"\nkind = "general"\n' + block)
    assert read_recipe(recipe, kind_of).stage("cold-start").config.per_family == 500
    asked = {"name": "taught", "kind": "traces", "parent": "", "url": school.url, "endpoint": {"model": "wise"}}
    recipe.write_text(tomli_w.dumps({"stage": [{**asked, "questions": 6, "samples": 4}]}))
    assert main(["run", str(recipe), "--runs", str(tmp_path / "runs")]) == 0
    counts = json.loads((tmp_path / "runs" / "mine" / "taught" / "traces.json").read_text())
    kept = read(tmp_path / "runs" / "mine" / "taught" / "data.jsonl")
    assert counts["kept"] == len(kept) >= 4, "of six: which of its answers are bad depends on the order of the requests"
    recipe.write_text(tomli_w.dumps({"stage": [{**asked, "url": "", "endpoint": {}}]}))
    assert main(["run", str(recipe), "--runs", str(tmp_path / "others")]) == 2


def test_every_reason_is_in_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "traces.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([^`]+)`", "".join(re.findall(r"^\| (.*?) \|", page, re.MULTILINE))))
    sources = [Path(inspect.getfile(module)).read_text() for module in (quality, selection, traces)]
    given = re.compile(r'(?:return|found\[chosen\] =|reason =) "([a-z ]+)"')
    returned = {reason for text in sources for reason in given.findall(text)}
    assert {verdict.value for verdict in Verdict} - {"correct"} < named and {"language", "enough"} < returned
    assert returned | {"family full"} | {verdict.value for verdict in Verdict} - {"correct"} == named


def test_another_file_in_a_mixture_is_another_stage(tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    families = [{"task": "arithmetic"}, {"task": f"math:{mine}"}]
    stage = {"name": "a", "kind": "traces", "task": "mix", "task_options": {"families": families}}
    (tmp_path / "r.toml").write_text(tomli_w.dumps({"stage": [stage]}))
    hashes = set()
    for answer in (1, 1, 2):
        mine.write_text(json.dumps({"prompt": "?", "answer": answer}))
        hashes.add(read_recipe(tmp_path / "r.toml", kind_of).stage("a").hash)
    assert len(hashes) == 2
