"""`sputnik generate` with a real (untrained) model: the same file whatever interrupts it, and bad lines stop nobody."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sputnik.__main__ import main
from sputnik.cli import generate
from sputnik.engine.llm import LLM
from sputnik.engine.params import SamplingParams
from sputnik.engine.sampling import sample_seed

pytestmark = pytest.mark.timeout(600)
QUESTION = [{"role": "user", "content": "What is 1 + 2?"}]
Run = Callable[..., int]


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def arguments(checkpoint: Path, prompts: Path, out: Path, *flags: str) -> list[str]:
    return ["generate", str(checkpoint), str(prompts), "--out", str(out), "--precision", "fp32", "--exact", *flags]


def test_each_line_gets_the_answer_the_model_gives(checkpoint: Path, tmp_path: Path) -> None:
    lines = [
        {"prompt": "What is", "params": {"max_tokens": 40, "temperature": 0, "logprobs": 1}},
        "\n",
        {"messages": QUESTION, "id": "mine"},
        {"messages": QUESTION, "id": 7, "thinking": False, "params": {"n": 3, "seed": 5, "logit_bias": {"65": -100}}},
        {"prompt": "3", "params": {"stop": ["e", "a"], "max_tokens": 30}},
    ]
    prompts, out = write(tmp_path / "prompts.jsonl", lines), tmp_path / "new" / "answers.jsonl"
    flags = ("--max-tokens", "12", "--thinking-budget", "4", "--seed", "3", "--temperature", "1", "--top-p", "1")
    assert main(arguments(checkpoint, prompts, out, *flags)) == 0
    found = read(out)
    assert [(each["line"], each.get("id")) for each in found] == [(1, None), (3, "mine"), (4, 7), (5, None)]

    llm = LLM(checkpoint, precision="fp32", exact=True)
    first = llm.generate(["What is"], SamplingParams(max_tokens=40, temperature=0, logprobs=1, thinking_budget=4))[0]
    (answer,) = found[0]["answers"]
    assert answer["text"] == first.text and answer["logprobs"] == first.outputs[0].logprobs
    assert answer["tokens"] == len(first.outputs[0].ids) and found[0]["prompt_tokens"] == len(first.prompt)
    second = llm.chat(QUESTION, SamplingParams(max_tokens=12, thinking_budget=4, seed=sample_seed(3, 3)))
    (answer,) = found[1]["answers"]
    assert (answer["thinking"], answer["text"], answer["finish"]) == (second.thinking, second.text, second.finish)
    params = SamplingParams(max_tokens=12, thinking_budget=4, seed=5, n=3, logit_bias={65: -100})
    third = llm.chat(QUESTION, params, thinking=False)
    assert [each["text"] for each in found[2]["answers"]] == [each.answer for each in third.outputs]
    assert not set("ea") & set(found[3]["answers"][0]["text"])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_ends_in_the_same_file(checkpoint: Path, tmp_path: Path, number: signal.Signals) -> None:
    lines = [
        {"messages": QUESTION, "id": f"q{place}", "params": {"max_tokens": 40 if place % 7 == 0 else 8}}
        for place in range(30)
    ]
    prompts, whole, broken = write(tmp_path / "prompts.jsonl", lines), tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert main(arguments(checkpoint, prompts, whole, "--concurrency", "16")) == 0
    command = [sys.executable, "-m", "sputnik", *arguments(checkpoint, prompts, broken, "--concurrency", "2")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while not broken.exists() or broken.read_bytes().count(b"\n") < 5:
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.01)
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
    if number == signal.SIGINT:
        assert process.returncode == 130 and "the same command goes on from here" in said
    done = broken.read_bytes()
    assert 5 <= done.count(b"\n") < 30
    broken.write_bytes(done + b'{"line": 29, "answ')  # killed in the middle of a line
    assert main(arguments(checkpoint, prompts, broken)) == 0
    assert broken.read_bytes() == whole.read_bytes()
    assert [each["line"] for each in read(whole)] == list(range(1, 31))
    before = broken.stat().st_mtime_ns
    assert main(arguments(checkpoint, prompts, broken)) == 0, "and once more: nothing to do"
    assert broken.stat().st_mtime_ns == before


def test_bad_lines_are_named_and_stop_nobody(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"prompt": "1 + " * 5000}
    bad: list[tuple[Any, str]] = [
        ('{"prompt": "a"', "not JSON"),
        ("[1]", 'need {"prompt"'),
        ({"prompt": "a", "messages": []}, 'need {"prompt"'),
        ({"prompt": "a", "max_tokens": 3}, "unknown key 'max_tokens'"),
        ({"prompt": 3}, "prompt: a value of the wrong type"),
        ({"messages": ["hello"]}, "messages: a value of the wrong type"),
        ({"messages": [{"role": "king", "content": "x"}]}, "role 'king'"),
        ({"prompt": "a", "params": {"temprature": 0}}, "did you mean 'temperature'"),
        ({"prompt": "a", "params": {"temperature": -1}}, "temperature = -1"),
        ({"prompt": "a", "params": {"regex": "("}}, "regex"),
        ('{"prompt": "\\ud800"}', "surrogate"),
        (long, r"prompt of \d+ tokens"),
    ]
    good = {"prompt": "What is"}
    lines = [line if isinstance(line, str) else json.dumps(line) for line, _ in bad]
    prompts = write(tmp_path / "prompts.jsonl", [f"{line}\n" for each in lines for line in (each, json.dumps(good))])
    out = tmp_path / "answers.jsonl"
    assert main(arguments(checkpoint, prompts, out, "--max-tokens", "4")) == 1
    said = capsys.readouterr().err
    for place, (_, words) in enumerate(bad):
        (line,) = re.findall(rf"^line {2 * place + 1}: .*$", said, re.MULTILINE)
        assert re.search(words, line), line
    assert "without an answer: line 1, 3, 5" in said
    assert [each["line"] for each in read(out)] == [2 * place + 2 for place in range(len(bad))]
    assert main(arguments(checkpoint, prompts, out, "--max-tokens", "4")) == 1, "they are as bad the next time"
    assert len(read(out)) == len(bad)


def test_answers_to_something_else_are_never_mixed_in(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = write(tmp_path / "prompts.jsonl", [{"prompt": "a"}, {"prompt": "b"}]), tmp_path / "out.jsonl"
    checkpoint = shutil.copytree(checkpoint, tmp_path / "model")

    def refused(*flags: str) -> str:
        before = out.read_bytes()
        assert main(arguments(checkpoint, prompts, out, *flags)) == 2
        assert out.read_bytes() == before
        return capsys.readouterr().err

    assert main(arguments(checkpoint, prompts, out, "--max-tokens", "4")) == 0
    assert "line 1 is one to another prompt, of another model or with other settings" in refused("--max-tokens", "5")
    write(prompts, [{"prompt": "a"}])
    assert "answers lines that" in refused("--max-tokens", "4")
    write(prompts, [{"prompt": "a"}, {"prompt": "c"}, {"prompt": "d"}])
    assert "line 2 is one to another prompt" in refused("--max-tokens", "4")
    write(prompts, [{"prompt": "a"}, {"prompt": "b"}])
    trained = checkpoint / "model.safetensors"
    before = trained.read_bytes()
    trained.write_bytes(before[:-1] + b"\1")  # trained on, in the same place
    assert "line 1 is one to another prompt, of another model" in refused("--max-tokens", "4")
    trained.write_bytes(before)
    write(prompts, [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "d"}])
    with out.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process" in refused("--max-tokens", "4")
    assert main(arguments(checkpoint, prompts, out, "--max-tokens", "4", "--concurrency", "1")) == 0, "more prompts"
    assert [each["line"] for each in read(out)] == [1, 2, 3]
    out.write_text("some text of mine\n")
    assert "no file of answers" in refused("--max-tokens", "4")


def test_nothing_is_left_behind_when_nothing_begins(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = write(tmp_path / "prompts.jsonl", [{"prompt": "a"}]), tmp_path / "out.jsonl"
    assert main(arguments(tmp_path / "no model", prompts, out)) == 2
    assert main(arguments(checkpoint, tmp_path / "none.jsonl", out)) == 2
    assert "no such file of prompts" in capsys.readouterr().err
    assert main(arguments(checkpoint, prompts, out, "--temperature", "-1")) == 2
    assert main(arguments(checkpoint, prompts, prompts)) == 2
    assert main(arguments(checkpoint, prompts, out, "--template", "zero", "--no-thinking")) == 2
    assert "template zero always thinks" in capsys.readouterr().err
    assert not out.exists() and read(prompts) == [{"prompt": "a"}]


def test_progress_says_how_far_how_fast_how_long(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "EVERY", 0.0)
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "a"}] * 3)
    assert main(arguments(checkpoint, prompts, tmp_path / "out.jsonl", "--max-tokens", "4", "--concurrency", "1")) == 0
    said = capsys.readouterr().err
    assert re.search(r"^0/3 prompts, \d+ tokens/s, \? left$", said, re.MULTILINE)
    assert re.search(r"^2/3 prompts, \d+ tokens/s, 0:0\d left$", said, re.MULTILINE)
    assert "3 of 3 prompts answered" in said
    assert [generate._duration(seconds) for seconds in (0.4, 75, 3661)] == ["0:00", "1:15", "1:01:01"]
