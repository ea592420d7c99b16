"""Every way an answer can go ends in the right verdict and the right denominator; a real model runs end to end."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sputnik.engine.params import SamplingParams
from sputnik.engine.sampler import Finish, Generation, Sampler
from sputnik.errors import ConfigError, TaskError
from sputnik.eval.harness import EvalResult, Policy, evaluate, examine
from sputnik.model.config import ModelConfig
from sputnik.model.transformer import Transformer
from sputnik.tasks.base import Problem, Task, Verdict, load_task
from sputnik.tasks.verify import VerifierPool
from sputnik.text.chat import render, render_example, template_hash
from sputnik.text.tokenizer import Tokenizer

WARM = SamplingParams(temperature=0.6, top_p=0.95, max_tokens=64, seed=3)


class Scripted:
    """Says to each problem, sample by sample, what `script` returns: (thought or None for no end, answer, finish)."""

    def __init__(self, tok: Tokenizer, problems: Sequence[Problem], template: str = "chat") -> None:
        self.tok, self.template = tok, template
        self.problem_of = {
            render(tok, [{"role": "user", "content": p.prompt}], template=template).ids: p for p in problems
        }
        self.script: Callable[[Problem, int], tuple[str | None, str, Finish]] = lambda p, _: ("So.", p.gold, "stop")
        self.seeds: list[int] = []

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams, n: int = 1) -> list[list[Generation]]:
        self.seeds.append(params.seed)
        return [[self._one(tuple(prompt), sample) for sample in range(n)] for prompt in prompts]

    def _one(self, prompt: tuple[int, ...], sample: int) -> Generation:
        problem = self.problem_of[prompt]
        thought, answer, finish = self.script(problem, sample)
        if thought is None:
            ids = [*self.tok.encode("So I go on"), self.tok.eos_id]
        else:
            ids = render_example(self.tok, problem.prompt, thought, answer, template=self.template)[0][len(prompt) :]
        return Generation(prompt, ids if finish == "stop" else ids[:-1], [0.0] * len(ids), finish)


@pytest.fixture
def setting(tok: Tokenizer, trouble: Task, pool: VerifierPool) -> tuple[Scripted, Tokenizer, Task, VerifierPool, list]:
    problems = trouble.problems("test", 8)
    return Scripted(tok, problems), tok, trouble, pool, problems


def test_gold_answers_score_1_with_all_evidence(setting: tuple) -> None:
    result = evaluate(*setting, k=4, params=WARM)
    assert result.pass_at_1.mean == result.cons_at_k.mean == result.pass_at_k["4"].mean == 1
    assert result.pass_at_1.low < 1
    assert (result.n, result.k, result.pass_at_1.n, result.pass_at_1.k) == (8, 4, 8, 4)
    assert list(result.pass_at_k) == ["1", "2", "4"]
    assert result.decoding == {
        "temperature": 0.6, "top_p": 0.95, "max_tokens": 64, "seed": 3, "k": 4,
    }  # fmt: skip
    assert (result.task, result.task_version, result.template) == ("trouble", "7", "chat")
    assert result.template_hash == template_hash("chat")
    assert result.best_constant.accuracy == 1 / 8
    assert result.warnings == ()
    assert result.well_formed == 1
    assert result.length == result.length_finished > result.thinking_length > 0


def test_each_verdict_is_counted_apart_and_only_correct_pays(setting: tuple) -> None:
    scripted, _, _, _, problems = setting
    says = {
        problems[0].id: ("So.", problems[0].gold, "stop"),
        problems[1].id: ("So.", "1", "stop"),
        problems[2].id: ("So.", "many", "stop"),
        problems[3].id: ("So.", problems[3].gold, "length"),  # right, but cut off before it said so
        problems[4].id: ("So.", "hang", "stop"),
        problems[5].id: (None, "", "stop"),
    }
    scripted.script = lambda problem, _: says[problem.id]
    result = evaluate(*setting[:4], problems[:6], k=1, params=WARM)
    assert result.verdicts == {
        "correct": 1, "wrong": 1, "unparseable": 2, "truncated": 1, "timeout": 1, "bad_gold": 0, "error": 0,
    }  # fmt: skip
    assert set(result.verdicts) == {verdict.value for verdict in Verdict}
    assert result.pass_at_1.mean == pytest.approx(1 / 6)
    assert result.truncated == pytest.approx(1 / 6)
    assert [warning for warning in result.warnings if "max_tokens" in warning]
    assert result.length_finished != result.length


def test_our_own_faults_leave_the_denominator_and_are_told(setting: tuple) -> None:
    scripted, tok, _, _, problems = setting
    bad = replace(problems[0], gold="bad")
    asked = [bad, *problems[1:4]]
    scripted = Scripted(tok, asked)
    broken = problems[1].id

    def script(problem: Problem, sample: int) -> tuple[str, str, Finish]:
        if problem.id == broken and sample == 0:
            return "So.", "boom", "stop"
        if problem.id == bad.id and sample == 0:
            return "So.", "1", "length"  # cut off, so the verifier does not see it; its question leaves all the same
        return "So.", problem.gold if problem.id != problems[3].id else "1", "stop"

    scripted.script = script
    result = evaluate(scripted, *setting[1:4], asked, k=4, params=WARM)
    assert (result.verdicts["bad_gold"], result.verdicts["error"], result.verdicts["truncated"]) == (3, 1, 1)
    assert result.pass_at_1.n == 3
    assert result.pass_at_1.mean == pytest.approx(2 / 3)
    assert result.pass_at_k["4"].n == 2  # the question that lost a sample has only three
    assert bad.id not in dict(result.questions)
    gold, error = result.warnings
    assert "1 of 4 questions" in gold and bad.id in gold
    assert "1 of 16 samples" in error and "verifier broke" in error


def test_nothing_judged_is_an_error_and_not_a_score_of_zero(setting: tuple) -> None:
    scripted, *_ = setting
    scripted.script = lambda *_: ("So.", "boom", "stop")
    with pytest.raises(TaskError, match="verifier broke"):
        evaluate(*setting, k=2, params=WARM)


def test_unreadable_answers_do_not_vote_but_do_count(setting: tuple) -> None:
    scripted, *_ = setting
    scripted.script = lambda problem, sample: ("So.", problem.gold if sample == 0 else "hm", "stop")
    result = evaluate(*setting, k=4, params=WARM)
    assert result.pass_at_1.mean == 0.25
    assert result.cons_at_k.mean == 1


def test_equal_answers_vote_together_however_they_are_written(tok: Tokenizer) -> None:
    task = load_task("arithmetic")
    problems = task.problems("test", 4)
    scripted = Scripted(tok, problems)
    scripted.script = lambda problem, sample: ("So.", [problem.gold, f"{problem.gold}.", "98", "99"][sample], "stop")
    with VerifierPool("arithmetic") as pool:
        assert evaluate(scripted, tok, task, pool, problems, k=4, params=WARM).cons_at_k.mean == 1


def test_pass_at_1_is_the_same_for_any_k(setting: tuple) -> None:
    scripted, *_ = setting
    scripted.script = lambda problem, sample: ("So.", problem.gold if sample % 2 else "1", "stop")
    scores = [evaluate(*setting, k=k, params=WARM).pass_at_1.mean for k in (2, 4, 8, 16, 32)]
    assert scores == [0.5] * 5


def test_zero_template_takes_the_answer_from_its_block(tok: Tokenizer, trouble: Task, pool: VerifierPool) -> None:
    problems = trouble.problems("test", 4)
    scripted = Scripted(tok, problems, "zero")
    result = evaluate(scripted, tok, trouble, pool, problems, k=2, params=WARM, template="zero")
    assert (result.pass_at_1.mean, result.template, result.well_formed) == (1, "zero", 1)


def test_self_checks_are_counted_in_the_thought_only(setting: tuple) -> None:
    scripted, *_ = setting
    scripted.script = lambda problem, sample: ("Wait, check." if sample == 0 else "So.", problem.gold, "stop")
    assert evaluate(*setting, k=4, params=WARM).self_check == 0.25


def test_chunks_report_progress_keep_order_and_have_their_own_seeds(
    setting: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sputnik.eval.harness.ROWS", 12)
    scripted, *_, problems = setting
    seen: list[tuple[int, int]] = []
    result = evaluate(*setting, k=4, params=WARM, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 8), (6, 8), (8, 8)]
    assert len(set(scripted.seeds)) == 3
    assert [each["problem_id"] for each in result.samples] == [problem.id for problem in problems for _ in range(4)]
    with pytest.raises(ConfigError, match="weights in memory have no name"):  # another policy would go on in the file
        examine(Policy(*setting[:2], WARM), *setting[2:], k=4, samples_to=tmp_path / "samples.jsonl")
    first = list(scripted.seeds)
    evaluate(*setting, k=4, params=WARM)
    assert scripted.seeds[3:] == first


def test_impossible_settings_are_refused(setting: tuple) -> None:
    for k, params, problems in ((0, WARM, setting[4]), (1, WARM, []), (2, replace(WARM, temperature=0.0), setting[4])):
        with pytest.raises(ConfigError):
            evaluate(*setting[:4], problems, k=k, params=params)


def test_result_is_json_and_leaves_samples_out_unless_asked(setting: tuple) -> None:
    result = evaluate(*setting, k=2, params=WARM)
    plain = json.loads(json.dumps(result.to_dict()))
    assert set(plain["pass_at_1"]) == {"mean", "low", "high", "n", "k"}
    assert "samples" not in plain
    assert len(result.to_dict(samples=True)["samples"]) == 16


def test_real_model_real_task_end_to_end() -> None:
    """An untrained tiny model: babble, most of it cut off, none of it correct, and a score that says so."""
    task = load_task("arithmetic")
    problems = task.problems("test", 6)
    tok = Tokenizer.train([problem.prompt for problem in problems], 320, digits=1)
    noise = torch.Generator().manual_seed(0)
    model = Transformer(ModelConfig.preset("tiny", vocab_size=tok.vocab_size)).init_weights(noise).eval()
    sampler = Sampler(model, tok.eos_id, precision="fp32")
    params = SamplingParams(max_tokens=12, seed=1)
    with VerifierPool("arithmetic") as pool:
        once, again = (evaluate(sampler, tok, task, pool, problems, k=4, params=params) for _ in range(2))
    assert isinstance(once, EvalResult)
    assert sum(once.verdicts.values()) == 24
    assert once.verdicts["correct"] == 0
    assert once.truncated > 0.5
    assert 0 < once.pass_at_1.high < 0.6
    assert once.samples == again.samples
    assert once.tokens_per_s > 0
