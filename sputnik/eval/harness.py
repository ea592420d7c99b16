"""Evaluate a model on a task: `k` samples per question, typed verdicts, scores that carry their own evidence.

    params = SamplingParams(temperature=0.6, top_p=0.95, max_tokens=512)
    result = evaluate(sampler, tok, task, pool, task.problems("test", 200), k=16, params=params)
    print(result.pass_at_1)        61.3 % [55.0, 67.2] (n=200, k=16)

The protocol is R1's (supplement D.1): zero-shot, sampled, pass@1 = mean correctness of the samples, cons@k = majority
vote. A cut-off answer is TRUNCATED and an empty one UNPARSEABLE without asking the verifier; both, and TIMEOUT, count
as not correct. BAD_GOLD and ERROR are faults of ours: the question or the sample leaves the denominator, and
`warnings` says so.

Left out: few-shot prompts, judges that are models, endpoints behind HTTP.
"""

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from sputnik.engine.params import SamplingParams
from sputnik.engine.sampler import Generation
from sputnik.errors import ConfigError, TaskError
from sputnik.eval.stats import Interval, cons_at_k, pass_at_1, pass_at_k
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
class EvalResult:
    """Scores with all that is needed to doubt them. Lengths are in tokens; shares are of all samples."""

    task: str
    task_version: str
    template: str
    template_hash: str
    decoding: dict[str, Any]
    n: int
    k: int
    pass_at_1: Interval
    cons_at_k: Interval
    pass_at_k: dict[str, Interval]
    """By number of samples: "1", "2", "4", ... and k."""
    best_constant: BestConstant
    """What one and the same answer to all questions would score."""
    verdicts: dict[str, int]
    """All seven, zeros too."""
    truncated: float
    well_formed: float
    self_check: float
    length: float
    length_finished: float
    thinking_length: float
    seconds: float
    tokens_per_s: float
    """Generated tokens per second of generation."""
    warnings: tuple[str, ...]
    """What a reader must know before believing the score; empty when all is well."""
    questions: tuple[tuple[str, float], ...]
    """(problem id, share correct) of every judged question, for paired comparison."""
    samples: tuple[dict[str, Any], ...]

    def to_dict(self, samples: bool = False) -> dict[str, Any]:
        """Plain JSON values; the samples only if asked for, they are long."""
        plain = asdict(self)
        return plain if samples else {key: value for key, value in plain.items() if key != "samples"}


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
        """What this sample says in a majority vote; one that could not be read has none."""
        readable = self.judgement.verdict in (Verdict.CORRECT, Verdict.WRONG)
        return normalised(task, self.problem, self.completion.answer) if readable else None

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
    samples_to: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    baseline: BestConstant | None = None,
) -> EvalResult:
    """Ask every problem `k` times. `samples_to` gets one JSON line per answer; `on_progress` counts questions.

    `baseline` spares the search for the best constant answer when the same problems are evaluated again and again.
    """
    if k < 1 or not problems:
        raise ConfigError(f"nothing to evaluate: {len(problems)} questions with k={k}; both must be at least 1")
    if params.temperature == 0 and k > 1:
        raise ConfigError(f"temperature 0 gives the same answer k={k} times; set k=1 or temperature=0.6")
    started, generating = time.perf_counter(), 0.0
    answers: list[list[Answer]] = []
    with ExitStack() as files:
        log = files.enter_context(samples_to.open("w", encoding="utf-8")) if samples_to else None
        for part, chunk_params in _chunks(problems, k, params):
            prompts = [render(tok, [{"role": "user", "content": p.prompt}], template=template) for p in part]
            begun = time.perf_counter()
            drawn = sampler.generate([prompt.ids for prompt in prompts], chunk_params, n=k)
            generating += time.perf_counter() - begun
            judged = judge_generations(tok, pool, part, prompts, drawn, template)
            answers += judged
            if log is not None:
                log.writelines(json.dumps(a.record(tok), ensure_ascii=False) + "\n" for group in judged for a in group)
                log.flush()
            if on_progress is not None:
                on_progress(len(answers), len(problems))
    return _result(
        tok,
        task,
        answers,
        {**params.settings(), "k": k},
        template,
        baseline or best_constant(problems, pool.verify),
        time.perf_counter() - started,
        generating,
    )


def judge_generations(
    tok: Tokenizer,
    pool: VerifierPool,
    problems: Sequence[Problem],
    prompts: Sequence[Prompt],
    drawn: Sequence[Sequence[Generation]],
    template: str,
) -> list[list[Answer]]:
    """Parse and judge; only finished answers with something to read go to the verifiers."""
    parsed = [
        [_parsed(tok, problem, generation, prompt, template) for generation in generations]
        for problem, prompt, generations in zip(problems, prompts, drawn, strict=True)
    ]
    open_ones = [answer for group in parsed for answer in group if _verifiable(answer)]
    judgements = iter(pool.verify([(answer.problem, answer.completion.answer) for answer in open_ones]))
    return [[replace(a, judgement=next(judgements)) if _verifiable(a) else a for a in group] for group in parsed]


def _parsed(tok: Tokenizer, problem: Problem, generation: Generation, prompt: Prompt, template: str) -> Answer:
    finished = generation.finish == "stop"
    completion = parse(tok, generation.ids, in_thought=prompt.in_thought, finished=finished, template=template)
    if not finished:
        return Answer(problem, generation, completion, Judgement(Verdict.TRUNCATED, "cut off by max_tokens"))
    missing = "the thought never ends" if not completion.closed else "no answer"
    return Answer(problem, generation, completion, Judgement(Verdict.UNPARSEABLE, missing))


def _verifiable(answer: Answer) -> bool:
    return answer.generation.finish == "stop" and answer.completion.closed and bool(answer.completion.answer)


def _chunks(
    problems: Sequence[Problem], k: int, params: SamplingParams
) -> Iterator[tuple[Sequence[Problem], SamplingParams]]:
    """Questions that fill `ROWS` rows; each chunk has its own seed, for with one seed all would share their luck."""
    size = max(1, ROWS // k)
    for start in range(0, len(problems), size):
        seed = random.Random(f"{params.seed}/{start}").getrandbits(63)
        yield problems[start : start + size], replace(params, seed=seed)


def _result(
    tok: Tokenizer,
    task: Task,
    answers: Sequence[Sequence[Answer]],
    decoding: dict[str, Any],
    template: str,
    baseline: BestConstant,
    seconds: float,
    generating: float,
) -> EvalResult:
    every = [answer for group in answers for answer in group]
    counts = Counter(answer.judgement.verdict for answer in every)
    judged = _judged(answers)
    if not judged:
        detail = next((a.judgement.detail for a in every if a.judgement.detail), "no detail given")
        raise TaskError(f"task {task.name!r}: no answer could be judged ({detail}); mend its verifier or gold answers")
    correct = [[answer.correct for answer in group] for group in judged]
    k = decoding["k"]
    finished = [len(answer.generation.ids) for answer in every if answer.generation.finish == "stop"]
    tokens = sum(len(answer.generation.ids) for answer in every)
    powers = {2**i for i in range(k.bit_length())}
    most = max(map(len, correct))  # errors may have taken samples from every question
    return EvalResult(
        task=task.name,
        task_version=task.version,
        template=template,
        template_hash=template_hash(template),
        decoding=decoding,
        n=len(answers),
        k=k,
        pass_at_1=pass_at_1(correct),
        cons_at_k=cons_at_k([[(answer.vote(task), answer.correct) for answer in group] for group in judged]),
        pass_at_k={str(j): pass_at_k(correct, j) for j in sorted(powers | {k}) if j <= most},
        best_constant=baseline,
        verdicts={verdict.value: counts[verdict] for verdict in Verdict},
        truncated=counts[Verdict.TRUNCATED] / len(every),
        well_formed=fmean(answer.completion.well_formed for answer in every),
        self_check=fmean(task.self_checks(answer.completion.thinking) for answer in every),
        length=tokens / len(every),
        length_finished=fmean(finished) if finished else 0.0,
        thinking_length=fmean(answer.thinking_length(tok) for answer in every),
        seconds=seconds,
        tokens_per_s=tokens / generating,
        warnings=tuple(_warnings(answers, counts, len(every))),
        questions=tuple((group[0].problem.id, fmean(answer.correct for answer in group)) for group in judged),
        samples=tuple(answer.record(tok) for answer in every),
    )


def _judged(answers: Sequence[Sequence[Answer]]) -> list[list[Answer]]:
    """What enters the scores: no question with a bad gold answer, no sample whose verifier broke."""
    sound = [group for group in answers if all(a.judgement.verdict is not Verdict.BAD_GOLD for a in group)]
    kept = [[answer for answer in group if answer.judgement.verdict is not Verdict.ERROR] for group in sound]
    return [group for group in kept if group]


def _warnings(answers: Sequence[Sequence[Answer]], counts: Counter[Verdict], total: int) -> Iterator[str]:
    def first(verdict: Verdict) -> str:
        answer = next(a for group in answers for a in group if a.judgement.verdict is verdict)
        return f"{answer.problem.id}: {answer.judgement.detail or answer.problem.gold}"

    if counts[Verdict.BAD_GOLD]:
        bad = sum(any(a.judgement.verdict is Verdict.BAD_GOLD for a in group) for group in answers)
        yield f"{bad} of {len(answers)} questions left out, gold answer not readable (first: {first(Verdict.BAD_GOLD)})"
    if counts[Verdict.ERROR]:
        yield f"{counts[Verdict.ERROR]} of {total} samples left out, verifier broke (first: {first(Verdict.ERROR)})"
    for verdict, fix in ((Verdict.TRUNCATED, "raise max_tokens"), (Verdict.TIMEOUT, "raise the verifier's deadline")):
        if counts[verdict] > total / 10:
            yield f"{counts[verdict]} of {total} samples {verdict.value}, counted as not correct; {fix}"
