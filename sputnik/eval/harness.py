"""Evaluate a model on a task: `k` samples per question, typed verdicts, scores that carry their own evidence.

    params = SamplingParams(temperature=0.6, top_p=0.95, max_tokens=512)
    result = evaluate(sampler, tok, task, pool, task.problems("test", 200), k=16, params=params)
    print(result.pass_at_1)        61.3 % [55.0, 67.2] (n=200, k=16)

The protocol is R1's (supplement D.1): zero-shot, sampled, pass@1 = mean correctness of the samples, cons@k = majority
vote. `examine` does the same with whatever can be asked: `models.Local` on the engine, `client.Endpoint` behind HTTP.

Left out: few-shot prompts, judges that are models.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from sputnik.config import config_hash
from sputnik.engine.params import SamplingParams
from sputnik.engine.sampler import Generation
from sputnik.errors import ConfigError
from sputnik.eval.records import FAILED, Question, Record, open_book
from sputnik.eval.results import EvalResult, Setting, summarise
from sputnik.tasks.base import BestConstant, Judgement, Problem, Task, Verdict, best_constant, normalised
from sputnik.tasks.verify import VerifierPool
from sputnik.text.chat import Completion, Prompt, parse, render, template_hash
from sputnik.text.tokenizer import Tokenizer

ROWS = 256
"""Answers drawn at once; progress is shown, and samples are written, after each such chunk."""


class Generates(Protocol):
    """The part of `engine.sampler.Sampler` that is used here."""

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, n: int = 1
    ) -> list[list[Generation]]: ...


@dataclass(frozen=True)
class Answer:
    """One sample and what was decided about it."""

    problem: Problem
    generation: Generation
    completion: Completion
    judgement: Judgement

    @property
    def correct(self) -> bool:
        return self.judgement.verdict is Verdict.CORRECT

    def vote(self, task: Task) -> str | None:
        return vote(task, self.problem, self.completion, self.judgement)

    def thinking_length(self, tok: Tokenizer) -> int:
        """Tokens of the thought."""
        return len(tok.encode(self.completion.thinking))

    def record(self, tok: Tokenizer) -> dict[str, Any]:
        return {
            "problem_id": self.problem.id,
            "prompt": self.problem.prompt,
            "completion": tok.decode(self.generation.ids),
            "thinking": self.completion.thinking,
            "answer": self.completion.answer,
            "gold": self.problem.gold,
            "verdict": self.judgement.verdict.value,
            "detail": self.judgement.detail,
            "length": len(self.generation.ids),
            "finish": self.generation.finish,
        }


@dataclass(frozen=True)
class Reply:
    """What came of asking once, whoever was asked. `length` in tokens; `error` says why there is nothing to judge."""

    completion: Completion
    text: str
    finish: str
    length: int
    thinking_length: int
    error: str = ""


NOTHING = Completion(thinking="", answer="", closed=False, truncated=False, well_formed=False)


def failed_reply(reason: str) -> Reply:
    return Reply(NOTHING, "", FAILED, 0, 0, error=reason)


Written = list[tuple[Problem, int, Reply]]
"""Problem, number of the sample, what was replied."""


class Model(Protocol):
    """Whoever can be asked. `identity` is JSON: all that an answer depends on beside the question."""

    @property
    def setting(self) -> Setting: ...

    @property
    def identity(self) -> dict[str, Any]: ...

    @property
    def usage(self) -> dict[str, int]: ...

    def ask(self, questions: Sequence[Question], k: int) -> Iterator[Written]:
        """The samples that are asked for, in any order, in whatever lots they are done."""


class Policy:
    """Weights in memory, asked `ROWS` answers at a time. Each lot has a seed of its own: all would share their luck."""

    def __init__(self, sampler: Generates, tok: Tokenizer, params: SamplingParams, template: str = "chat") -> None:
        self.sampler, self.tok, self.params, self.template = sampler, tok, params, template
        self.usage: dict[str, int] = {}

    @property
    def setting(self) -> Setting:
        return Setting(self.template, template_hash(self.template), self.params.settings())

    @property
    def identity(self) -> dict[str, Any]:
        return {"template": template_hash(self.template), "decoding": self.params.settings()}

    def ask(self, questions: Sequence[Question], k: int) -> Iterator[Written]:
        size = max(1, ROWS // k)
        for start in range(0, len(questions), size):
            part = questions[start : start + size]
            prompts = [prompt_of(self.tok, question.problem, self.template) for question in part]
            seed = random.Random(f"{self.params.seed}/{start}").getrandbits(63)
            drawn = self.sampler.generate([prompt.ids for prompt in prompts], replace(self.params, seed=seed), n=k)
            yield [
                (question.problem, sample, self._reply(generations[sample], prompt))
                for question, prompt, generations in zip(part, prompts, drawn, strict=True)
                for sample in question.samples
            ]

    def _reply(self, generation: Generation, prompt: Prompt) -> Reply:
        completion = _parsed(self.tok, generation, prompt, self.template)
        thought = thought_tokens(self.tok, generation.ids, prompt.in_thought)
        return Reply(completion, self.tok.decode(generation.ids), generation.finish, len(generation.ids), thought)


def evaluate(
    sampler: Generates,
    tok: Tokenizer,
    task: Task,
    pool: VerifierPool,
    problems: Sequence[Problem],
    *,
    k: int,
    params: SamplingParams,
    template: str = "chat",
    on_progress: Callable[[int, int], None] | None = None,
    baseline: BestConstant | None = None,
) -> EvalResult:
    """Ask every problem `k` times; `on_progress` counts questions.

    `baseline` spares the search for the best constant answer when the same problems are evaluated again and again.
    """
    model = Policy(sampler, tok, params, template)
    return examine(model, task, pool, problems, k=k, on_progress=on_progress, baseline=baseline)


def examine(
    model: Model,
    task: Task,
    pool: VerifierPool,
    problems: Sequence[Problem],
    *,
    k: int,
    samples_to: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    baseline: BestConstant | None = None,
) -> EvalResult:
    """`evaluate` for any model. `samples_to` gets one JSON line per answer; what it already holds is not asked again.
    That needs a model whose `identity` tells it from others."""
    setting = model.setting
    if samples_to is not None and isinstance(model, Policy):
        raise ConfigError("weights in memory have no name to know their answers by: save them, and use models.Local")
    if k < 1 or not problems:
        raise ConfigError(f"nothing to evaluate: {len(problems)} questions with k={k}; both must be at least 1")
    if setting.decoding.get("temperature") == 0 and k > 1:
        raise ConfigError(f"temperature 0 gives the same answer k={k} times; set k=1 or temperature=0.6")
    started, generating, tokens = time.perf_counter(), 0.0, 0
    key = config_hash({"model": model.identity, "task": task.name, "version": task.version})
    with open_book(samples_to, key) as book:
        questions = book.missing(problems, k)
        left = {question.problem.id: len(question.samples) for question in questions}
        done = len(problems) - len(left)
        lots = model.ask(questions, k) if questions else iter(())
        while True:
            begun = time.perf_counter()
            written = next(lots, None)
            generating += time.perf_counter() - begun
            if written is None:
                break
            book.add(judge_replies(task, pool, written, key))
            tokens += sum(reply.length for _, _, reply in written)
            for problem, _, _ in written:
                left[problem.id] -= 1
                done += left[problem.id] == 0
            if on_progress is not None:
                on_progress(done, len(problems))
        book.put_in_order(problems)
        groups = book.of(problems, k)
    return summarise(
        groups,
        problems,
        task,
        setting,
        k,
        baseline or best_constant(problems, pool.verify),
        seconds=time.perf_counter() - started,
        tokens_per_s=tokens / generating if tokens else 0.0,
        usage=model.usage,
    )


def thought_tokens(tok: Tokenizer, ids: Sequence[int], in_thought: bool) -> int:
    """How many of `ids` stand inside a thought, tags not counted."""
    count = 0
    for id in ids if tok.has_thoughts else ():
        if id in (tok.think_id, tok.end_think_id):
            in_thought = id == tok.think_id
        else:
            count += in_thought
    return count


def prompt_of(tok: Tokenizer, problem: Problem, template: str) -> Prompt:
    return render(tok, [{"role": "user", "content": problem.prompt}], template=template)


def judge_replies(task: Task, pool: VerifierPool, written: Written, key: str = "") -> list[Record]:
    """The verdict on each reply."""
    judgements = iter(judge_completions(pool, [(p, reply.completion) for p, _, reply in written if not reply.error]))
    records = []
    for problem, sample, reply in written:
        judgement = Judgement(Verdict.ERROR, reply.error) if reply.error else next(judgements)
        records.append(_record(task, problem, sample, reply, judgement, key))
    return records


def _record(task: Task, problem: Problem, sample: int, reply: Reply, judgement: Judgement, key: str) -> Record:
    completion = reply.completion
    return Record(
        key=key,
        problem_id=problem.id,
        sample=sample,
        family=str(problem.meta.get("family", "")),
        prompt=problem.prompt,
        gold=problem.gold,
        completion=reply.text,
        thinking=completion.thinking,
        answer=completion.answer,
        verdict=judgement.verdict.value,
        detail=judgement.detail,
        vote=vote(task, problem, completion, judgement),
        finish=reply.finish,
        length=reply.length,
        thinking_length=reply.thinking_length,
        well_formed=completion.well_formed,
        self_check=task.task_of(problem).self_checks(completion.thinking),
    )


def vote(task: Task, problem: Problem, completion: Completion, judgement: Judgement) -> str | None:
    """What a sample says in a majority vote; one that could not be read has none."""
    readable = judgement.verdict in (Verdict.CORRECT, Verdict.WRONG)
    return normalised(task, problem, completion.answer) if readable else None


def judge_generations(
    tok: Tokenizer,
    pool: VerifierPool,
    problems: Sequence[Problem],
    prompts: Sequence[Prompt],
    drawn: Sequence[Sequence[Generation]],
    template: str,
) -> list[list[Answer]]:
    """Parse and judge the answers to each problem."""
    parsed = [
        [(problem, _parsed(tok, generation, prompt, template)) for generation in generations]
        for problem, prompt, generations in zip(problems, prompts, drawn, strict=True)
    ]
    judgements = iter(judge_completions(pool, [pair for group in parsed for pair in group]))
    return [
        [Answer(problem, each, completion, next(judgements)) for each, (problem, completion) in zip(generations, group)]
        for generations, group in zip(drawn, parsed, strict=True)
    ]


def judge_completions(pool: VerifierPool, written: Sequence[tuple[Problem, Completion]]) -> list[Judgement]:
    """Only finished answers with something to read go to the verifiers."""
    found = [_unreadable(completion) for _, completion in written]
    readable = [(p, completion.answer) for (p, completion), known in zip(written, found, strict=True) if known is None]
    judgements = iter(pool.verify(readable))
    return [next(judgements) if known is None else known for known in found]


def _unreadable(completion: Completion) -> Judgement | None:
    if completion.truncated:
        return Judgement(Verdict.TRUNCATED, "cut off by max_tokens")
    if not completion.closed:
        return Judgement(Verdict.UNPARSEABLE, "the thought never ends")
    return None if completion.answer else Judgement(Verdict.UNPARSEABLE, "no answer")


def _parsed(tok: Tokenizer, generation: Generation, prompt: Prompt, template: str) -> Completion:
    finished = generation.finish == "stop"
    return parse(tok, generation.ids, in_thought=prompt.in_thought, finished=finished, template=template)
