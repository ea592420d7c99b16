"""What an answer earns, part by part, on answers written out by hand; the reward models are real ones."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sputnik.engine.params import SamplingParams
from sputnik.engine.rollouts import Rollouts
from sputnik.engine.sampler import Generation
from sputnik.errors import CheckpointError, ConfigError, DataError
from sputnik.eval.harness import Answer
from sputnik.tasks.base import Judgement, Problem, Verdict
from sputnik.tasks.verify import VerifierPool
from sputnik.text.chat import parse, render
from sputnik.text.tokenizer import Tokenizer
from sputnik.train.health import rollout_metrics
from sputnik.train.losses import Objective
from sputnik.train.reward_model import RewardModel
from sputnik.train.rewards import Judges, OpenPrompt, RewardConfig, read_prompts, rule_parts
from sputnik.train.rollout import Group, RolloutWorker

OPEN = [OpenPrompt(prompt=text, id=text[:4]) for text in ("Say something kind.", "What is a sum?")]


def written(tok: Tokenizer, text: str, finished: bool = True, problem: Problem | None = None) -> Answer:
    """`text` as an answer that began inside its thought; "|" closes the thought."""
    prompt = render(tok, [{"role": "user", "content": "1+2"}])
    thought, bar, rest = text.partition("|")
    ids = [*tok.encode(thought), *([tok.end_think_id] if bar else []), *tok.encode(rest)]
    ids += [tok.eos_id] if finished else []
    generation = Generation(prompt.ids, ids, [-1.0] * len(ids), "stop" if finished else "length")
    completion = parse(tok, ids, in_thought=True, finished=finished)
    return Answer(problem or Problem(prompt="1+2", gold="3"), generation, completion, Judgement(Verdict.CORRECT))


def judge_of(policy: Any, kind: Any, seed: int = 0) -> RewardModel:
    """A reward model whose head has an opinion, though nobody has taught it one."""
    model = RewardModel.of(policy.checkpoint, kind, precision="fp32")
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(seed))
    model.card = dataclasses.replace(model.card, mean=0.5, std=2.0)
    return model.requires_grad_(False)


def test_parts_are_added_up_by_their_weights(policy: Any) -> None:
    answer = written(policy.tok, "one and two is three|3")
    config = RewardConfig(language=1.0)
    parts = rule_parts(answer, config, 100, 0.0)
    assert parts == {"accuracy": 1.0, "format": 1.0, "language": 1.0}
    assert config.total(parts) == 3.0
    assert RewardConfig().total(rule_parts(answer, RewardConfig(), 100, 0.0)) == 2.0
    assert RewardConfig(accuracy=2.0, format=0.5, language=0.25).total(parts) == 2.75


@pytest.mark.parametrize(
    ("thought", "share"),
    [("one and two is three", 1.0), ("one and two 加加加", 0.5), ("加加加加", 0.0), ("1+2=3", 1.0), ("", 0.0)],
)
def test_the_language_of_the_thought_alone_is_paid(policy: Any, thought: str, share: float) -> None:
    config = RewardConfig(language=1.0)
    for answer in (written(policy.tok, f"{thought}|3"), written(policy.tok, f"{thought}|加加加")):
        assert rule_parts(answer, config, 100, 0.0)["language"] == share


def test_open_prompts_earn_no_accuracy(policy: Any) -> None:
    parts = rule_parts(written(policy.tok, "kind|You are.", problem=OPEN[0]), RewardConfig(), 100, 0.2)
    assert parts == {"format": 1.0, "overlong": 0.0}


def test_judges_score_in_standard_deviations_and_silence_is_the_least_help(policy: Any) -> None:
    helpful, safe = judge_of(policy, "pairwise"), judge_of(policy, "pointwise", seed=1)
    answers = [
        written(policy.tok, "one|3"), written(policy.tok, "two|What is"), written(policy.tok, "three|"),
        written(policy.tok, "never closed"), written(policy.tok, "cut|3 and", finished=False),
    ]  # fmt: skip
    parts = Judges([safe, helpful]).parts(answers)
    asked = [(answer.generation.prompt, answer.generation.ids) for answer in answers]
    raw = helpful.score(*zip(*asked[:2], strict=True))
    expected = [(score - 0.5) / 2.0 for score in raw]
    assert [each["helpful"] for each in parts[:2]] == pytest.approx(expected)
    assert [each["helpful"] for each in parts[2:]] == [min(each["helpful"] for each in parts[:2])] * 3
    assert [each["safe"] for each in parts] == pytest.approx(safe.standardised(safe.score(*zip(*asked, strict=True))))
    thoughts = [written(policy.tok, f"{thought}|3") for thought in ("one", "two plus two is four")]
    first, second = Judges([helpful]).parts(thoughts)
    assert first == pytest.approx(second), "helpfulness is judged on the final answer only"
    first, second = Judges([safe]).parts(thoughts)
    assert abs(first["safe"] - second["safe"]) > 1e-4, "safety on the whole output"


def test_two_judges_of_a_kind_and_foreign_ones_are_refused(policy: Any, tmp_path: Path) -> None:
    model = judge_of(policy, "pairwise")
    with pytest.raises(ConfigError, match="pairwise and pairwise; give at most one of each kind"):
        Judges([model, model])
    model.save(tmp_path / "judge", model.card)
    assert list(Judges.load([tmp_path / "judge"], policy.tok, "chat", "fp32").models) == ["helpful"]
    with pytest.raises(ConfigError, match="reads template 'chat', but the policy writes 'zero'"):
        Judges.load([tmp_path / "judge"], policy.tok, "zero", "fp32")
    other = Tokenizer.train(["another text", "of other words"], 290)
    with pytest.raises(CheckpointError, match="its tokenizer is not the policy's"):
        Judges.load([tmp_path / "judge"], other, "chat", "fp32")


def collect(policy: Any, pool: VerifierPool, judges: Judges, problems: Sequence[Problem]) -> list[Group]:
    sampler = Rollouts(policy.model(), policy.tok.eos_id, "fp32")  # whose samples do not depend on their company
    worker = RolloutWorker(sampler, policy.tok, policy.task, pool, "chat", Objective(), RewardConfig(safe=0.5), judges)
    return worker.collect(problems, 4, SamplingParams(max_tokens=40, seed=7))


def test_questions_and_open_prompts_are_rewarded_side_by_side(policy: Any, pool: VerifierPool) -> None:
    judges = Judges([judge_of(policy, "pairwise"), judge_of(policy, "pointwise", seed=1)])
    questions = policy.task.problems("train", 3)
    groups = collect(policy, pool, judges, [*questions, *OPEN])
    alone = collect(policy, pool, judges, questions)
    for group, same in zip(groups, alone, strict=False):
        assert [s.judgement for s in group] == [s.judgement for s in same]
        assert [set(s.rewards) for s in group] == [{"accuracy", "format"}] * 4
    for group in groups[3:]:
        for sample in group:
            parts = sample.rewards
            assert sample.open and sample.judged and set(parts) == {"format", "helpful", "safe"}
            assert sample.reward == pytest.approx(parts["format"] + parts["helpful"] + 0.5 * parts["safe"])
            assert sample.record(policy.tok)["verdict"] == "open"
        assert sum(sample.advantage for sample in group) == pytest.approx(0, abs=1e-4)
        assert any(sample.advantage for sample in group)
    told, of_questions = (rollout_metrics(each, policy.task, policy.tok) for each in (groups, alone))
    assert {key: told[key] for key in of_questions if key != "useful_groups"} == {
        key: value for key, value in of_questions.items() if key != "useful_groups"
    }
    opened = [sample for group in groups[3:] for sample in group]
    assert told["general_answers"] == 8 and told["general_unjudged"] == 0
    assert told["general_helpful"] == pytest.approx(sum(s.rewards["helpful"] for s in opened) / 8)
    assert sum(told["verdicts"].values()) == 12


def test_a_score_that_is_no_number_leaves_the_group_and_is_counted(policy: Any, pool: VerifierPool) -> None:
    broken = judge_of(policy, "pointwise")
    with torch.no_grad():
        broken.head.bias.fill_(math.nan)
    groups = collect(policy, pool, Judges([broken]), OPEN)
    for sample in (sample for group in groups for sample in group):
        assert sample.judgement == Judgement(Verdict.ERROR, "the score of 'safe' is not a number")
        assert sample.advantage == 0 and math.isfinite(sample.reward)
    told = rollout_metrics(groups, policy.task, policy.tok)
    assert (told["general_unjudged"], told["unjudged_groups"]) == (8, 1.0)


@pytest.mark.parametrize(("step", "count"), [(9, 0), (10, 2), (99, 2)])
def test_open_prompts_come_late(step: int, count: int) -> None:
    assert RewardConfig(general_from=10).open_prompts(step, 8) == count
    assert RewardConfig(general_from=10, general_share=0.01).open_prompts(step, 8) == min(count, 1)
    assert RewardConfig().open_prompts(step, 8) == 0


def test_prompt_files_are_read_once_each_and_mistakes_have_their_line(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    lines = [{"prompt": "Hi", "kind": "chat"}, {"prompt": "Bye"}, {"prompt": "Hi"}]
    good.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    prompts = read_prompts([good, good])
    assert [(p.prompt, p.meta) for p in prompts] == [("Hi", {"kind": "chat"}), ("Bye", {})]
    assert len({p.id for p in prompts}) == 2
    for line, message in (
        ("{", "bad.jsonl:2: not JSON"),
        ('{"prompt": " "}', 'bad.jsonl:2: "prompt" must be a text that is not empty'),
        ('{"prompt": "\\ud800"}', 'bad.jsonl:2: "prompt" holds half of a surrogate pair'),
    ):
        bad.write_text('{"prompt": "Hi"}\n' + line + "\n")
        with pytest.raises(DataError, match=message):
            read_prompts([bad])
    bad.write_text("\n")
    with pytest.raises(DataError, match="they are empty"):
        read_prompts([bad])
