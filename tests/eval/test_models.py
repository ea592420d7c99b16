"""Models on the engine: the score is that of the answers the engine gives, whatever else runs or was there before."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mode

import pytest

from sputnik.engine.llm import LLM
from sputnik.engine.params import SamplingParams
from sputnik.engine.sampling import sample_seed
from sputnik.errors import ConfigError
from sputnik.eval.harness import Written, examine
from sputnik.eval.models import Local, fingerprint
from sputnik.eval.records import Question
from sputnik.tasks.base import Problem, Task, hash_of
from sputnik.tasks.verify import VerifierPool
from sputnik.text.chat import parse, template_hash

WARM = SamplingParams(temperature=0.9, top_p=0.95, max_tokens=24, seed=3)


@pytest.fixture(scope="module")
def problems(task: Task) -> list[Problem]:
    return task.problems("test", 12)


def test_the_record_is_what_the_engine_answers(
    llm: LLM, task: Task, judges: VerifierPool, problems: list[Problem]
) -> None:
    result = examine(Local(llm, WARM, "tiny"), task, judges, problems, k=3)
    assert (result.n, result.k, result.model, result.template) == (12, 3, "tiny", "chat")
    assert result.template_hash == template_hash("chat")
    assert result.decoding == {
        "temperature": 0.9, "top_p": 0.95, "max_tokens": 24, "seed": 3, "context": llm.context, "k": 3,
    }  # fmt: skip
    prompt = llm.render([{"role": "user", "content": problems[5].prompt}])
    seed = sample_seed(3, 1 + hash_of(problems[5].id))
    outputs = llm.generate([prompt], replace(WARM, n=3, seed=seed))[0].outputs
    for output, sample in zip(outputs, result.samples[15:18], strict=True):
        assert sample["problem_id"] == problems[5].id
        assert sample["completion"] == llm.tok.decode(output.ids) and sample["length"] == len(output.ids)
        finished = output.finish.startswith("stop")
        parsed = parse(llm.tok, output.ids, in_thought=prompt.in_thought, finished=finished)
        assert (sample["thinking"], sample["answer"]) == (parsed.thinking, parsed.answer)
        assert (sample["finish"] == "stop") == finished == (not parsed.truncated)
    assert len({sample["completion"] for sample in result.samples}) > 30


def test_answers_do_not_depend_on_how_many_are_asked(
    llm: LLM, task: Task, judges: VerifierPool, problems: list[Problem]
) -> None:
    few = examine(Local(llm, WARM), task, judges, problems[3:5], k=2).samples
    many = examine(Local(llm, WARM), task, judges, problems, k=5).samples
    assert [many[place] for place in (15, 16, 20, 21)] == list(few)


class Stopping(Local):
    """Ctrl-C after some lots."""

    def ask(self, questions: list[Question], k: int) -> Iterator[Written]:
        for number, written in enumerate(super().ask(questions, k)):
            if number == 3:
                raise KeyboardInterrupt
            yield written


def test_a_broken_run_goes_on_and_its_file_is_that_of_an_unbroken_one(
    llm: LLM, task: Task, judges: VerifierPool, problems: list[Problem], tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    wanted = examine(Local(llm, WARM), task, judges, problems, k=3, samples_to=whole)
    with pytest.raises(KeyboardInterrupt):
        examine(Stopping(llm, WARM), task, judges, problems, k=3, samples_to=broken)
    kept = broken.read_bytes()
    assert 0 < len(kept.splitlines()) < 36
    broken.write_bytes(kept[:-9])  # and the machine lost power while it wrote
    seen: list[int] = []
    found = examine(
        Local(llm, WARM), task, judges, problems, k=3, samples_to=broken, on_progress=lambda done, _: seen.append(done)
    )
    assert broken.read_bytes() == whole.read_bytes()
    assert found.samples == wanted.samples and found.pass_at_1 == wanted.pass_at_1
    assert seen[-1] == 12 and seen == sorted(seen)
    again = examine(Local(llm, WARM), task, judges, problems, k=3, samples_to=broken)
    assert again.samples == wanted.samples and again.tokens_per_s == 0
    more = examine(Local(llm, WARM), task, judges, problems, k=4, samples_to=broken)
    assert [s for s in more.samples if s["sample"] < 3] == list(wanted.samples)


def test_another_model_or_setting_does_not_go_on_in_the_same_file(
    llm: LLM, task: Task, judges: VerifierPool, problems: list[Problem], tmp_path: Path, checkpoint: Path
) -> None:
    path = tmp_path / "book.jsonl"
    examine(Local(llm, WARM, weights="a"), task, judges, problems[:2], k=1, samples_to=path)
    for other in (Local(llm, WARM, weights="b"), Local(llm, replace(WARM, top_p=0.9), weights="a")):
        with pytest.raises(ValueError, match="another model, to another task or with other settings"):
            examine(other, task, judges, problems[:2], k=1, samples_to=path)
    print_of = fingerprint(checkpoint)
    assert print_of == fingerprint(checkpoint) != fingerprint(checkpoint / "config.json")
    copy = shutil.copytree(checkpoint, tmp_path / "copy", copy_function=shutil.copyfile)  # younger than the first
    assert print_of == fingerprint(copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert print_of != fingerprint(copy)


def test_an_answer_gets_what_the_context_leaves_and_a_prompt_without_room_is_truncated(
    llm: LLM, task: Task, judges: VerifierPool, problems: list[Problem]
) -> None:
    length = len(llm.render([{"role": "user", "content": ""}]).ids)
    filler = llm.tok.decode([llm.tok.encode("W")[0]])
    tight, full = (
        replace(problems[0], prompt=filler * (llm.context - length - room), id=f"{room:016x}") for room in (5, 0)
    )
    result = examine(Local(llm, replace(WARM, max_tokens=4000)), task, judges, [tight, full], k=2)
    assert [sample["length"] for sample in result.samples if sample["finish"] == "length"][-2:] == [0, 0]
    assert all(sample["length"] <= 5 for sample in result.samples)
    assert {sample["verdict"] for sample in result.samples[2:]} == {"truncated"}


def test_thoughts_are_steered_through_the_params(
    llm: LLM, task: Task, judges: VerifierPool, problems: list[Problem]
) -> None:
    params = replace(WARM, thinking_budget=4, max_tokens=40)
    result = examine(Local(llm, params), task, judges, problems, k=2)
    assert result.decoding["thinking_budget"] == 4
    closing = len(llm.tok.encode("\n"))
    lengths = [sample["thinking_length"] for sample in result.samples]
    assert mode(lengths) == 4 + closing and max(lengths) <= 4 + 4 * closing  # one opened again is closed at once
    assert sum(bool(sample["answer"]) for sample in result.samples) > 12
    wide = replace(WARM, max_tokens=8 * llm.context, extend=1, answer_reserve=llm.context)
    asked = Local(llm, wide)._params(Question(problems[0], (0,)), 1, room=40)
    assert (asked.max_tokens, asked.answer_reserve) == (40, 5), "not a reserve that fills the context"


def test_same_answer_many_times_is_refused(llm: LLM, task: Task, judges: VerifierPool, problems: list[Problem]) -> None:
    with pytest.raises(ConfigError, match="temperature 0 gives the same answer"):
        examine(Local(llm, replace(WARM, temperature=0)), task, judges, problems, k=2)
    greedy = examine(Local(llm, replace(WARM, temperature=0)), task, judges, problems[:3], k=1)
    assert json.loads(json.dumps(greedy.to_dict()))["decoding"]["temperature"] == 0
