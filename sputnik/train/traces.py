"""Traces to learn from: several answers to each question, of which the right, readable and different ones are kept.

    counts = collect_traces(TracesConfig(task="arithmetic", questions=500, samples=8), checkpoint, out, meter)

Rejection sampling and teacher samples of R1 (2.3.1, 2.3.3; B.3): the cold start is made from R1-Zero's own answers, the
second SFT from those of the RL checkpoint, distillation from those of a larger model, here or behind a URL. A sample is
kept if the verifier says correct, its form is the template's, a person can read its thought (text/quality.py), its
answer said as a plain sentence is judged correct again, and it is no copy of another (selection.py). At most `keep` a
question and `per_family` a family are kept.

    OUT/data.jsonl      what is kept: prompt, thinking, answer, task, id, verdict, length
    OUT/rejected.jsonl  every other sample with the reason
    OUT/traces.json     counts by reason and by family

A step is a lot of questions, and a pure function of weights, seed and what was kept before, so a killed run goes on
exactly (train/loop.py); a teacher behind a URL gives other answers each time, but none is asked for twice. Questions
come from the train split alone. Left out: near copies among the answers to different questions, a model that rewrites
or judges.
"""

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from torch import Tensor

from sputnik.config import from_dict, to_dict
from sputnik.cost import Meter, decode_flops_per_token, forward_flops_per_token
from sputnik.engine.llm import LLM
from sputnik.engine.params import SamplingParams
from sputnik.errors import ConfigError, DataError
from sputnik.eval.client import Endpoint, EndpointConfig
from sputnik.eval.harness import ROWS, Model, Written, judge_replies
from sputnik.eval.models import Local
from sputnik.eval.records import Question, Record
from sputnik.hardware import resolve_precision
from sputnik.tasks.base import Problem, Task, Verdict, broken_task, load_task, self_check
from sputnik.tasks.final import final_answer
from sputnik.tasks.verify import VerifierPool
from sputnik.tasks.wordings import wordings_of
from sputnik.text.quality import Readable, is_readable
from sputnik.train.examples import digest
from sputnik.train.guards import Guard, GuardConfig
from sputnik.train.loop import Loop, Read
from sputnik.train.selection import Candidate, Prefer, choose, key
from sputnik.train.state import read_jsonl, write_json

FAULTS = (Verdict.BAD_GOLD.value, Verdict.ERROR.value)
FIXES: Mapping[str, str] = {
    "wrong": "take an easier task, more samples or a better model",
    "unparseable": "its answers are not in a form the task reads; `instruction` can ask for it",
    "truncated": "raise max_tokens",
    "malformed": "its answers are not in the form of the template; is `template` the one it was taught?",
    "timeout": "the verifier is too slow for these answers",
    "conclusion": "the task's `conclude` does not say the answer so that `verify` takes it",
}
"""What to do when one reason is why nothing was kept; for all others `readable` is to be loosened."""


@dataclass(frozen=True)
class TracesConfig:
    """Everything else follows from these."""

    task: str = "arithmetic"
    """A name, `gym:NAME`, `math:FILE`, `mix`, or a Python file of your own (docs/tasks.md)."""
    task_options: Mapping[str, Any] = field(default_factory=dict)
    template: Literal["auto", "chat", "zero", "own"] = "auto"
    instruction: str = ""
    """Added to each question when it is asked, and no part of the examples: how a teacher is to answer."""
    questions: int = 1000
    samples: int = 8
    """Of each question."""
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256
    keep: int = 1
    """At most so many of a question."""
    prefer: Prefer = "short"
    """Which ones: the short, the diverse, or any, that is, the first."""
    per_family: int | None = None
    """At most so many of each family of a mixture; a family that has them is asked no further."""
    checks: float = 0.0
    """Share of kept thoughts that look back at themselves: until it is reached, such thoughts come first."""
    reworded: float = 0.0
    """Share of the examples whose question stands there in another wording (`Task.wordings`) than it was asked in."""
    sentences: bool = True
    """Say answers as plain sentences (`Task.conclude`); else as the model wrote them."""
    readable: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Readable` (text/quality.py): language, repeats, code_blocks, paragraph, longest ..."""
    url: str = ""
    """A teacher behind an OpenAI-compatible API instead of the parent's checkpoint."""
    endpoint: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `EndpointConfig` (eval/client.py): model, key_env, concurrency ..."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("questions", "samples", "max_tokens", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: set it to 1 or more")
        for name in ("checks", "reworded"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: a share, from 0 to 1")
        if self.per_family is not None and self.per_family < 1:
            raise ConfigError(f"per_family = {self.per_family}: set it to 1 or more, or leave it out")
        if self.temperature == 0 and self.samples > 1:
            raise ConfigError(f"temperature 0 gives the same answer {self.samples} times; set samples = 1")
        if self.endpoint and not self.url:
            raise ConfigError("endpoint is for a teacher behind a URL: set url, or leave it out")
        from_dict(Readable, self.readable, "readable")
        from_dict(EndpointConfig, self.endpoint, "endpoint")
        self.params()

    def params(self) -> SamplingParams:
        return SamplingParams(
            temperature=self.temperature, top_p=self.top_p, max_tokens=self.max_tokens, seed=self.seed
        )


@dataclass
class Sample:
    """`asked` and `said` are question and answer as they will be learned; `reason` why they will not be."""

    problem: Problem
    record: Record
    asked: str
    said: str = ""
    reason: str | None = None

    @property
    def candidate(self) -> Candidate:
        return Candidate(self.record.thinking, self.said, self.record.length, self.record.self_check)

    def line(self, task: str) -> dict[str, Any]:
        record = self.record
        shared = {"task": task, "id": record.problem_id, "verdict": record.verdict, "length": record.length}
        if self.reason is None:
            return {"prompt": self.asked, "thinking": record.thinking, "answer": self.said, **shared}
        told = {"prompt": record.prompt, "thinking": record.thinking, "answer": record.answer, **shared}
        return {**told, "reason": self.reason, "detail": record.detail}


class Collection:
    """The stage that `Loop` drives."""

    def __init__(self, config: TracesConfig, task: Task, pool: VerifierPool, model: Model, out: Path) -> None:
        self.config, self.task, self.pool, self.model, self.out = config, task, pool, model, out
        self.rules = from_dict(Readable, config.readable, "readable")
        self.questions = task.problems("train", config.questions, config.seed)
        if config.reworded and not any(wordings_of(self.task, each) for each in self.questions):
            raise ConfigError(f"reworded: task {task.name!r} knows its questions in one wording only; leave it out")
        self.lot = max(1, ROWS // config.samples)
        self.reasons: Counter[str] = Counter()
        self.families: dict[str, Counter[str]] = {}
        self.faults: dict[str, str] = {}
        """The first of each of `FAULTS`."""
        self._seen: set[int] = set()
        self._used_before: Counter[str] = Counter()

    @property
    def steps(self) -> int:
        return math.ceil(len(self.questions) / self.lot)

    @property
    def usage(self) -> dict[str, int]:
        """What a teacher counted, in earlier runs too."""
        return dict(self._used_before + Counter(self.model.usage))

    # --- what the loop calls ---

    def before(self) -> dict[str, Any]:
        return {}

    def step(self, step: int, loop: Loop) -> dict[str, Any]:
        lot = self.questions[(step - 1) * self.lot : step * self.lot]
        asked = [problem for problem in lot if not self._is_full(self._family(problem))]
        samples = self._judged(self._ask(asked, loop.meter))
        self._conclude([sample for sample in samples if sample.reason is None])
        for _, group in groupby(samples, key=lambda sample: sample.problem.id):
            self._select(list(group))
        for sample in samples:
            loop.log("data" if sample.reason is None else "rejected", sample.line(self._family(sample.problem)))
        self._count(asked, samples)
        correct = sum(sample.record.correct for sample in samples)
        return {
            "samples": len(samples),
            "correct": correct / len(samples) if samples else 0.0,
            "kept": sum(counts["kept"] for counts in self.families.values()),
        }

    def batch(self) -> dict[str, Tensor]:
        return {}

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        families = {name: dict(own) for name, own in self.families.items()}
        return {}, {"reasons": dict(self.reasons), "families": families, "faults": self.faults, "usage": self.usage}

    def load(self, read: Read, plain: Mapping[str, Any]) -> None:
        self.reasons, self.faults = Counter(plain["reasons"]), dict(plain["faults"])
        self._used_before = Counter(plain["usage"])
        self.families = {name: Counter(own) for name, own in plain["families"].items()}
        self._seen = {key(line["prompt"], line["thinking"]) for line in read_jsonl(self.out / "data.jsonl")}

    # --- one lot of questions ---

    def _ask(self, problems: Sequence[Problem], meter: Meter) -> Written:
        """All samples of each problem, in order."""
        config, places = self.config, {problem.id: place for place, problem in enumerate(problems)}
        if isinstance(self.model, Local):
            self.model.llm.engine.scheduler.forget()  # what a killed run had in its cache would change the last bits
        told = [replace(each, prompt=f"{each.prompt}\n{config.instruction}".rstrip("\n")) for each in problems]
        questions = [Question(problem, tuple(range(config.samples))) for problem in told]
        written = [each for lot in self.model.ask(questions, config.samples) for each in lot] if questions else []
        meter.add(tokens=sum(reply.length for _, _, reply in written), flops=self._flops(written))
        return sorted(
            ((problems[places[problem.id]], number, reply) for problem, number, reply in written),
            key=lambda each: (places[each[0].id], each[1]),
        )

    def _judged(self, written: Written) -> list[Sample]:
        records = judge_replies(self.task, self.pool, written)
        pairs = zip(written, records, strict=True)
        samples = [Sample(problem, record, self._wording(problem)) for (problem, _, _), record in pairs]
        for sample in samples:
            record = sample.record
            if not record.correct:
                sample.reason = record.verdict
            elif not record.well_formed:
                sample.reason = "malformed"
            else:
                sample.reason = is_readable(record.thinking, self.rules)
        return samples

    def _conclude(self, samples: Sequence[Sample]) -> None:
        """Put the answers into sentences, which must be judged correct as well."""
        for sample in samples:
            sample.said = self._sentence(sample) if self.config.sentences else sample.record.answer
        judgements = self.pool.verify([(sample.problem, sample.said) for sample in samples])
        for sample, judgement in zip(samples, judgements, strict=True):
            if judgement.verdict is not Verdict.CORRECT:
                sample.reason = "conclusion"

    def _wording(self, problem: Problem) -> str:
        """How the question of an example stands in it: the same for all samples of a question."""
        rng = random.Random(f"wording/{self.config.seed}/{problem.id}")
        others = wordings_of(self.task, problem) if rng.random() < self.config.reworded else ()
        return rng.choice(others) if others else problem.prompt

    def _sentence(self, sample: Sample) -> str:
        task = self.task.task_of(sample.problem)
        try:
            return task.conclude(sample.problem, final_answer(sample.record.answer))
        except Exception as error:
            raise broken_task(error, f"{type(task).__name__}.conclude", type(task)) from error

    def _select(self, group: Sequence[Sample]) -> None:
        """The samples of one question: what is kept counts at once, for the questions after it."""
        family = self.families.setdefault(self._family(group[0].problem), Counter())
        for sample in group:
            if sample.reason is None and key(sample.asked, sample.record.thinking) in self._seen:
                sample.reason = "duplicate"
        good = [sample for sample in group if sample.reason is None]
        checks_first = self._total("checks") < self.config.checks * self._total("kept")
        reasons = choose(
            [sample.candidate for sample in good], self.config.keep, self.config.prefer, checks_first=checks_first
        )
        for sample, reason in zip(good, reasons, strict=True):
            sample.reason = reason or ("family full" if self._is_full(self._family(sample.problem)) else None)
            if sample.reason is None:
                family["kept"] += 1
                family["checks"] += sample.record.self_check
                family["tokens"] += sample.record.length
        self._seen |= {key(sample.asked, sample.record.thinking) for sample in good if sample.reason is None}

    def _count(self, asked: Sequence[Problem], samples: Sequence[Sample]) -> None:
        for problem in asked:
            self.families.setdefault(self._family(problem), Counter())["questions"] += 1
        for sample in samples:
            family = self.families[self._family(sample.problem)]
            family["samples"] += 1
            family["correct"] += sample.record.correct
            self.reasons[sample.reason or "kept"] += 1
            if sample.reason in FAULTS:
                self.faults.setdefault(sample.reason, sample.record.detail or sample.record.problem_id)

    def _family(self, problem: Problem) -> str:
        return str(problem.meta.get("family", self.task.name))

    def _is_full(self, family: str) -> bool:
        limit = self.config.per_family
        return limit is not None and self.families.get(family, Counter())["kept"] >= limit

    def _total(self, what: str) -> int:
        return sum(counts[what] for counts in self.families.values())

    def _flops(self, written: Written) -> float:
        """Of the answers, and of each question once; 0 for a teacher that computes elsewhere."""
        if not isinstance(self.model, Local):
            return 0.0
        llm, total = self.model.llm, 0.0
        shape = llm.engine.model.config
        for problem, number, reply in written:
            prompt = len(llm.render([{"role": "user", "content": problem.prompt}]).ids)
            total += reply.length * decode_flops_per_token(shape, prompt + reply.length)
            total += 0.0 if number else prompt * forward_flops_per_token(shape, prompt)
        return total

    # --- what came of it ---

    def summary(self) -> dict[str, Any]:
        kept = max(1, self._total("kept"))
        figures = {name: self._total(name) for name in ("questions", "samples", "correct", "kept")}
        shares = {"checks": self._total("checks") / kept, "length": self._total("tokens") / kept}
        reasons = dict(self.reasons.most_common())
        return {**figures, **shares, "reasons": reasons, "families": self.families, "usage": self.usage}


def collect_traces(
    config: TracesConfig, checkpoint: Path | None, out: Path, meter: Meter, console: Console | None = None
) -> dict[str, Any]:
    """Ask, filter, write into `out`, or go on where a killed call was; returns the counts of `traces.json`.

    `checkpoint` is the model to ask unless `config.url` names one. DataError if nothing at all was kept."""
    task = load_task(config.task, config.task_options)
    console = console or Console()
    with VerifierPool(config.task, config.task_options) as pool:
        self_check(task, verify=pool.verify)
        model, identity = _model(config, checkpoint)
        stage = Collection(config, task, pool, model, out)
        settings = {**to_dict(config), "precision": resolve_precision(config.precision)}
        loop = Loop(
            out,
            steps=stage.steps,
            identity={**settings, "task_version": task.version, "model": identity},
            meter=meter,
            guard=lambda: Guard(GuardConfig("off", "off", entropy="off", length="off", clipped="off")),
            logs=("data", "rejected"),
            headline=("kept", "correct"),
            save_steps=1,
        )
        console.print(f"    {config.questions} questions of {task.name}, {config.samples} samples each")
        loop.run(stage)
    summary = stage.summary()
    setting = asdict(model.setting)
    write_json(out / "traces.json", {"task": task.name, "version": task.version, "model": setting, **summary})
    for fault, first in stage.faults.items():
        console.print(f"    warning: {stage.reasons[fault]} samples {fault}, first: {first}", style="yellow")
    if not summary["kept"]:
        raise DataError(_nothing(stage.reasons, out))
    return summary


def _model(config: TracesConfig, checkpoint: Path | None) -> tuple[Model, Any]:
    """Who is asked, and what its answers depend on."""
    if config.url:
        endpoint = Endpoint(config.url, from_dict(EndpointConfig, config.endpoint, "endpoint"), config.params())
        return endpoint, endpoint.identity
    if checkpoint is None:
        raise ConfigError("traces need a model: a checkpoint, or url = ... of a teacher")
    llm = LLM(checkpoint, config.template, precision=config.precision)
    files = [checkpoint] if checkpoint.is_file() else sorted(checkpoint.glob("*.safetensors"))
    return Local(llm, config.params(), str(checkpoint)), digest(files)


def _nothing(reasons: Counter[str], out: Path) -> str:
    counts = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
    commonest = reasons.most_common(1)[0][0] if reasons else ""
    fix = FIXES.get(commonest, "loosen the rules of `readable`")
    return f"no trace was kept of {reasons.total()} samples ({counts}): {fix}; {out / 'rejected.jsonl'} has them all"
