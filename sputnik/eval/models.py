"""A model on our engine as something to evaluate: a checkpoint, a GGUF file, a model by name.

    model = Local(LLM("smollm2"), SamplingParams(temperature=0.6, top_p=0.95, max_tokens=512, seed=0), "smollm2")
    examine(model, task, pool, problems, k=8)

Questions run together as far as the engine has room, and each has its own seed, made of the seed and the question: an
answer does not depend on how many others are asked. Where prompt and `max_tokens` exceed the context, the answer gets
what is left; a prompt that leaves nothing is TRUNCATED before it begins.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sputnik.engine.llm import LLM, Stream
from sputnik.engine.outputs import Output
from sputnik.engine.params import SamplingParams
from sputnik.engine.sampling import sample_seed
from sputnik.engine.stride import STRIDE
from sputnik.eval.harness import Reply, Written, failed_reply, thought_tokens
from sputnik.eval.records import Question
from sputnik.eval.results import Setting
from sputnik.tasks.base import hash_of
from sputnik.text.chat import Completion, Prompt, parse
from sputnik.text.templates import template_hash

AHEAD = 2
"""Samples that are started, as a multiple of those that run at once: the engine always has a next one."""
RESERVE = 8
"""With forced thinking budgets, one in so many tokens is kept for the answer."""


class Local:
    def __init__(self, llm: LLM, params: SamplingParams, name: str = "", weights: str = "") -> None:
        """`weights`: a fingerprint of the model, so that a file of answers is not continued by another one."""
        self.llm, self.params, self.name, self.weights = llm, params, name, weights
        self.usage: dict[str, int] = {}

    @property
    def setting(self) -> Setting:
        template = self.llm.template
        own = hashlib.sha256((self.llm.tok.chat_template or "").encode()).hexdigest()[:16]
        decoding = {**self.params.settings(), "context": self.llm.context}
        return Setting(template, own if template == "own" else template_hash(template), decoding, self.name)

    @property
    def identity(self) -> dict[str, Any]:
        setting, config = self.setting, self.llm.engine.config
        computed = {"precision": config.precision, "weights": config.weights}
        return {"template": setting.template_hash, "decoding": setting.decoding, "model": self.weights, **computed}

    def ask(self, questions: Sequence[Question], k: int) -> Iterator[Written]:
        waiting = iter(questions)
        running: dict[int, tuple[Question, Prompt, Stream]] = {}
        most = max(2, AHEAD * self.llm.engine.config.max_running // k)
        while True:
            while len(running) < most and (question := next(waiting, None)) is not None:
                prompt = self.llm.render([{"role": "user", "content": question.problem.prompt}])
                room = self.llm.context - len(prompt.ids)
                if room < 1:
                    yield [(question.problem, sample, NO_ROOM) for sample in question.samples]
                    continue
                stream = self.llm.start(prompt, self._params(question, k, room))
                running[stream.number] = question, prompt, stream
            if not running:
                return
            ended = [running.pop(stream.number) for stream in self.llm.step(STRIDE)]
            if ended:
                yield [
                    (question.problem, sample, self._reply(outputs[sample], prompt))
                    for question, prompt, stream in ended
                    for outputs in [stream.result().outputs]
                    for sample in question.samples
                ]

    def _params(self, question: Question, k: int, room: int) -> SamplingParams:
        seed = self.params.seed
        own = None if seed is None else sample_seed(seed, 1 + hash_of(question.problem.id))
        most, reserve = min(self.params.max_tokens, room), self.params.answer_reserve
        reserve = reserve if reserve < most else most // RESERVE  # kept of `max_tokens`, it may be all of the room
        return replace(self.params, n=k, seed=own, max_tokens=most, answer_reserve=reserve)

    def _reply(self, output: Output, prompt: Prompt) -> Reply:
        if output.finish == "failed":
            return failed_reply("the model's logits are not finite")
        tok, stopped = self.llm.tok, output.finish.startswith("stop")
        if self.llm.template == "own":
            answer = output.answer.strip()
            closed = not output.finish.endswith("while thinking")
            completion = Completion(output.thinking, answer, closed, not stopped, stopped and closed and bool(answer))
        else:
            completion = parse(
                tok, output.ids, in_thought=prompt.in_thought, finished=stopped, template=self.llm.template
            )
        thought = thought_tokens(tok, output.ids, prompt.in_thought)
        return Reply(completion, tok.decode(output.ids), "stop" if stopped else output.finish, len(output.ids), thought)


NO_ROOM = Reply(Completion("", "", closed=False, truncated=True, well_formed=False), "", "length", 0, 0)


def fingerprint(checkpoint: Path) -> str:
    """Tells a checkpoint from another, or from itself after more training; a copy of it is the same one."""
    files = [checkpoint] if checkpoint.is_file() else sorted(path for path in checkpoint.iterdir() if path.is_file())
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            whole.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()[:16]
