"""`sputnik generate MODEL PROMPTS.jsonl --out ANSWERS.jsonl`: answers to a file of prompts, many at a time.

A line of the prompts is {"prompt": TEXT}, which the model goes on with, or {"messages": [...]}, which it answers. It
may have an "id", "thinking": false, and "params": fields of `SamplingParams` that replace the flags. Its answer:

    {"line": 3, "id": "q3", "answers": [{"text": "12", "thinking": "7+5=12", "finish": "stop", "tokens": 9}], ...}

Answers are written as they are done; when all are there the file is put into the order of the prompts. After a kill or
Ctrl-C the same command goes on: what has its answer is not asked again, and a file of answers to other prompts, of
another model or of other settings is refused. Lines that cannot be answered are reported by number and stop nobody; the
exit code is then 1. Left out: prompts from a pipe, which could not be resumed.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from rich.status import Status
from tyro.conf import Positional, UseAppendAction, arg

from sputnik.cli.answers import Answers, open_answers
from sputnik.cli.console import Console
from sputnik.cli.model import Template, load_llm, require_thinking
from sputnik.config import check_keys, from_dict
from sputnik.engine.llm import LLM, Stream
from sputnik.engine.outputs import Output
from sputnik.engine.params import SamplingParams
from sputnik.engine.sampling import sample_seed
from sputnik.engine.stride import STRIDE
from sputnik.errors import ConfigError, DataError, SputnikError
from sputnik.eval.models import fingerprint
from sputnik.recipe.checkpoints import find_checkpoint
from sputnik.text.chat import Prompt

TYPES: Mapping[str, Any] = {"prompt": str, "messages": list, "id": str | int, "thinking": bool, "params": dict}
AHEAD = 4
"""Prompts started, as a multiple of those that run at once: the engine always has a next one."""
EVERY = 10.0
"""Seconds between lines of progress where there is no terminal."""


@dataclass(frozen=True)
class GenerateConfig:
    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A checkpoint directory, a GGUF file, a run, or the name of a run or a model (smollm2)."""
    prompts: Annotated[Positional[Path], arg(metavar="PROMPTS")]
    """A file with a line of JSON for each prompt, as above."""
    out: Path
    """The file of answers."""
    template: Template = "auto"
    """Of conversations; auto: the one the model was trained with."""
    thinking: bool = True
    thinking_budget: int | None = None
    """Tokens after which a thought is closed."""
    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 1024
    """Longest answer, thinking included; less where the context has less room."""
    n: int = 1
    """Answers to each prompt."""
    stop: UseAppendAction[tuple[str, ...]] = ()
    """A text that ends an answer; may be repeated."""
    seed: int = 0
    concurrency: int = 64
    """Answers written at once."""
    cache_gib: float = 1.0
    precision: str = "auto"
    weights: str | None = None
    """int8 or int4: smaller and faster."""
    exact: bool = False
    """An answer depends on nothing but its line and the settings; slower prefill."""

    def params(self) -> SamplingParams:
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            max_tokens=self.max_tokens,
            n=self.n,
            stop=self.stop,
            thinking_budget=self.thinking_budget,
        )

    def lines(self, weights: str) -> Iterator[tuple[int, str, bytes]]:
        """Number, key and text of each prompt; the key changes with all that its answer depends on. `weights`: a
        fingerprint of the model."""
        beside = ("prompts", "out", "concurrency", "cache_gib")
        decisive = {k: v for k, v in asdict(self).items() if k not in beside} | {"fingerprint": weights}
        settings = json.dumps(decisive, sort_keys=True)
        secret = hashlib.sha256(settings.encode()).digest()
        with self.prompts.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if raw := raw.strip():
                    yield number, hashlib.blake2b(raw, digest_size=8, key=secret).hexdigest(), raw


class Batch:
    """One run over the prompts that have no answer yet."""

    def __init__(self, config: GenerateConfig, weights: str, llm: LLM, answers: Answers, console: Console) -> None:
        self.config, self.weights, self.llm, self.answers, self.console = config, weights, llm, answers, console
        self.params = config.params()
        self.bad: list[int] = []
        self._running: dict[int, tuple[dict[str, Any], Stream]] = {}

    def run(self, progress: "Progress") -> None:
        waiting = (each for each in self.config.lines(self.weights) if each[0] not in self.answers.keys)
        while True:
            while len(self._running) < AHEAD * self.config.concurrency and (each := next(waiting, None)) is not None:
                self._start(*each)
            if not self._running:
                return
            for stream in self.llm.step(STRIDE):
                self._finish(stream)
            progress.show(len(self.answers.keys), self.llm.engine.metrics.drawn_tokens)

    def _start(self, line: int, key: str, raw: bytes) -> None:
        try:
            record = _read(raw)
            prompt: Prompt | list[int]
            if "prompt" in record:
                prompt = self.llm.encode(record["prompt"])
            else:
                thinking = record.get("thinking", self.config.thinking)
                require_thinking(self.llm, thinking)
                prompt = self.llm.render(record["messages"], thinking)
            length = len(prompt.ids) if isinstance(prompt, Prompt) else len(prompt)
            room = max(1, self.llm.context - length)
            base = replace(self.params, max_tokens=min(self.params.max_tokens, room))
            own = {"seed": sample_seed(self.config.seed, line)} | record.get("params", {})
            stream = self.llm.start(prompt, from_dict(SamplingParams, asdict(base) | own, "params"))
        except SputnikError as error:
            self._report(line, str(error))
            return
        head = {name: value for name, value in record.items() if name == "id"}
        self._running[stream.number] = {"line": line, **head, "key": key}, stream

    def _finish(self, stream: Stream) -> None:
        head, _ = self._running.pop(stream.number)
        result = stream.result()
        if any(each.finish == "failed" for each in result.outputs):
            self._report(head["line"], "failed: the model's logits are not finite, or the grammar gave up")
            return
        answers = [_described(each) for each in result.outputs]
        self.answers.write({**head, "prompt_tokens": len(result.prompt), "answers": answers})

    def _report(self, line: int, text: str) -> None:
        self.bad.append(line)
        self.console.print(f"line {line}: {' '.join(text.split())}", style="red", markup=False, soft_wrap=True)


class Progress:
    """How far it is, how fast, how long yet: all the time on a terminal, elsewhere a line now and then."""

    def __init__(self, console: Console, total: int, known: int) -> None:
        self.total, self.known, self.tokens = total, known, 0
        self._begun = self._told = time.perf_counter()
        self._console = console
        self._status = Status("", console=console) if console.is_terminal else None

    def show(self, done: int, tokens: int) -> None:
        self.tokens, now = tokens, time.perf_counter()
        if now - self._told < (0.2 if self._status else EVERY):
            return
        self._told = now
        left = (now - self._begun) / (done - self.known) * (self.total - done) if done > self.known else None
        line = f"{done}/{self.total} prompts, {self.speed:.0f} tokens/s, {_duration(left)} left"
        if self._status is None:
            self._console.print(line, markup=False)
        else:
            self._status.start()
            self._status.update(line)

    def close(self) -> None:
        if self._status is not None:
            self._status.stop()

    @property
    def speed(self) -> float:
        return self.tokens / max(1e-9, time.perf_counter() - self._begun)


def main(config: GenerateConfig) -> int:
    if not config.prompts.is_file():
        raise DataError(f"{config.prompts}: no such file of prompts")
    if config.out.exists() and config.out.samefile(config.prompts):
        raise ConfigError(f"--out {config.out} is the file of prompts: give another")
    console = Console(stderr=True, highlight=False)
    with open_answers(config.out) as answers:
        return _answer(config, answers, console)


def _answer(config: GenerateConfig, answers: Answers, console: Console) -> int:
    weights = fingerprint(find_checkpoint(config.model).path)
    total, known = _survey(config, weights, answers), len(answers.keys)
    bad: list[int] = []
    if known < total:
        llm = load_llm(
            config.model, config.template, precision=config.precision, weights=config.weights, exact=config.exact,
            max_running=config.concurrency, cache_bytes=int(config.cache_gib * 2**30),
        )  # fmt: skip
        require_thinking(llm, config.thinking)
        batch, progress = Batch(config, weights, llm, answers, console), Progress(console, total, known)
        bad = batch.bad
        try:
            batch.run(progress)
        except KeyboardInterrupt:
            console.print(f"{len(answers.keys)} of {total} answered: the same command goes on from here")
            raise
        finally:
            progress.close()
        console.print(f"{progress.tokens} tokens, {progress.speed:.0f} tokens/s")
    answers.sort()
    earlier = f", {known} of them by an earlier run" if known else ""
    console.print(f"{len(answers.keys)} of {total} prompts answered{earlier}")
    if bad:
        console.print(f"without an answer: line {', '.join(map(str, sorted(bad)))}", soft_wrap=True)
    return 1 if bad else 0


def _survey(config: GenerateConfig, weights: str, answers: Answers) -> int:
    """How many prompts there are; DataError if the answers that are there are not theirs."""
    total, found = 0, 0
    for line, key, _ in config.lines(weights):
        total += 1
        found += line in answers.keys
        if answers.keys.get(line, key) != key:
            raise DataError(
                f"{config.out}: the answer to line {line} is one to another prompt, of another model or with "
                "other settings: give another --out"
            )
    if found < len(answers.keys):
        raise DataError(f"{config.out}: answers lines that {config.prompts} does not have: give another --out")
    return total


def _read(raw: bytes) -> dict[str, Any]:
    """A line of the prompts, checked."""
    try:
        record = json.loads(raw)
        json.dumps(record, ensure_ascii=False).encode()  # no half of a surrogate pair
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}") from None
    if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
        raise DataError('need {"prompt": TEXT} or {"messages": [{"role": ..., "content": ...}, ...]}')
    check_keys(record, list(TYPES), "it")
    wrong = [name for name, value in record.items() if not isinstance(value, TYPES[name])]
    if wrong or not all(isinstance(message, dict) for message in record.get("messages", ())):
        raise DataError(f"{(wrong or ['messages'])[0]}: a value of the wrong type")
    return record


def _described(output: Output) -> dict[str, Any]:
    found = {"text": output.answer, "thinking": output.thinking, "finish": output.finish, "tokens": len(output.ids)}
    scores = {"logprobs": output.logprobs, "top_logprobs": output.top}
    return found | {name: values for name, values in scores.items() if values}


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
