"""A model behind an OpenAI-compatible URL as something to evaluate.

    model = Endpoint("https://api.deepseek.com", EndpointConfig(model="deepseek-reasoner", key_env="DEEPSEEK_API_KEY"),
                     SamplingParams(temperature=0.6, top_p=0.95, max_tokens=32_768))
    examine(model, task, pool, problems, k=8, samples_to=Path("scores.samples.jsonl"))

One request a sample, `concurrency` at a time. Full queues (429, with Retry-After), server errors and broken connections
are tried again; a request that fails for good is a `failed` reply, counted as ERROR and never as wrong. What no retry
can mend (key, balance, name of the model, no server at all) ends the run at once, with all answers so far in the file.

Thoughts are read from `reasoning_content` or `reasoning`; failing these, from <think> tags in the text, the one place
where tags are looked for in text, because there are no ids. Tokens are those of `usage`. Left out: streaming, so a
proxy that cuts silent connections must be told to wait; n > 1 in one request, which not all servers know.
"""

import asyncio
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import msgspec

from sputnik.config import set_by_path
from sputnik.engine.params import SamplingParams
from sputnik.engine.sampling import sample_seed
from sputnik.errors import ConfigError, MissingPackage
from sputnik.eval.harness import Reply, Written, failed_reply
from sputnik.eval.records import Question
from sputnik.eval.results import Setting
from sputnik.tasks.base import Problem, hash_of
from sputnik.text.chat import Completion

CHAT = "/chat/completions"
TRANSIENT = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
HOPELESS = frozenset({401, 402, 403, 404, 405})
LONGEST_WAIT_S = 300.0
"""However long a server asks us to wait."""
FIRST_WAIT_S = 1.0
"""Where it says nothing; doubled with each attempt, up to a minute, less up to a half by chance."""


@dataclass(frozen=True)
class EndpointConfig:
    model: str = ""
    """Its name at the server; empty: the only one that the server lists."""
    key_env: str = "SPUTNIK_API_KEY"
    """Environment variable that holds the key."""
    concurrency: int = 16
    """Requests at once."""
    retries: int = 6
    timeout_s: float = 1800.0
    """Longest time of one request."""
    seeds: bool = False
    """Send a seed, another one for each sample."""
    body: tuple[str, ...] = ()
    """KEY=VALUE of further fields of the request, for example chat_template_kwargs.thinking=true."""

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.retries < 0 or self.timeout_s <= 0:
            raise ConfigError("endpoint: need concurrency >= 1, retries >= 0 and timeout_s > 0")

    def fields(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for assignment in self.body:
            set_by_path(found, assignment)
        return found


class Message(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class Choice(msgspec.Struct):
    message: Message
    finish_reason: str | None = None


class Details(msgspec.Struct):
    reasoning_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    completion_tokens_details: Details | None = None


class Body(msgspec.Struct):
    """The part of a response that is read."""

    choices: list[Choice]
    usage: Usage | None = None


class Refused(Exception):
    """An attempt failed; `after` seconds from now another may succeed, None: no other will."""

    def __init__(self, reason: str, after: float | None = None, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.after, self.unreachable = after, unreachable


class Endpoint:
    def __init__(self, url: str, config: EndpointConfig, params: SamplingParams) -> None:
        """ConfigError if the URL is none, the key is missing, or no server is there when it has to name its model."""
        params.only({"temperature", "top_p", "max_tokens", "seed"}, "a model behind a URL")
        self.config, self.params = config, params
        self.url = url.rstrip("/").removesuffix(CHAT)
        if not _is_url(self.url):
            raise ConfigError(f"{url!r} is no address of a server; write http://HOST:PORT/v1, or https://...")
        self._counts: Counter[str] = Counter()
        self._answered = False
        key = os.environ.get(config.key_env, "")
        if not key and config.key_env != EndpointConfig.key_env:
            raise ConfigError(f"the environment variable {config.key_env} is empty: put the key of {self.url} into it")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.model = config.model or self._only_model()

    @property
    def setting(self) -> Setting:
        decoding = {**self.params.settings(), **self.config.fields()}
        if not self.config.seeds:
            decoding.pop("seed")
        return Setting("endpoint", "", decoding, f"{self.model} at {self.url}")

    @property
    def identity(self) -> dict[str, Any]:
        return {"url": self.url, "model": self.model, "decoding": self.setting.decoding}

    @property
    def usage(self) -> dict[str, int]:
        """Of this run's requests."""
        return dict(self._counts)

    def ask(self, questions: Sequence[Question], k: int) -> Iterator[Written]:
        jobs = iter([(question.problem, sample) for question in questions for sample in question.samples])
        client, pending = self._client(), set[asyncio.Task[tuple[Problem, int, Reply]]]()
        with asyncio.Runner() as runner:
            try:
                while written := runner.run(self._some(client, jobs, pending)):
                    yield written
            finally:
                runner.run(_end(client, pending))

    async def _some(self, client: Any, jobs: Iterator[tuple[Problem, int]], pending: set[Any]) -> Written:
        """What is done next; empty when all is."""
        while len(pending) < self.config.concurrency and (job := next(jobs, None)) is not None:
            pending.add(asyncio.create_task(self._sample(client, *job)))
        if not pending:
            return []
        done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        pending -= done
        return [task.result() for task in done]

    async def _sample(self, client: Any, problem: Problem, sample: int) -> tuple[Problem, int, Reply]:
        message = {"role": "user", "content": problem.prompt}
        params = self.params
        body = {"model": self.model, "messages": [message], "temperature": params.temperature, "top_p": params.top_p,
                "max_tokens": params.max_tokens, "stream": False}  # fmt: skip
        if self.config.seeds:
            body["seed"] = sample_seed(params.seed or 0, 1 + hash_of(f"{problem.id}/{sample}")) % 2**31
        for attempt in range(self.config.retries + 1):
            try:
                return problem, sample, await self._once(client, body | self.config.fields())
            except Refused as refused:
                reason, last = refused, attempt == self.config.retries
                if refused.unreachable and last and not self._answered:
                    raise ConfigError(f"{self.url}: {refused}; is the server up?") from None
                if refused.after is None or last:
                    break
                await asyncio.sleep(refused.after or random.uniform(0.5, 1) * min(60.0, FIRST_WAIT_S * 2**attempt))
        return problem, sample, failed_reply(str(reason))

    async def _once(self, client: Any, body: dict[str, Any]) -> Reply:
        http = _httpx()
        try:
            async with asyncio.timeout(self.config.timeout_s):
                response = await client.post(self.url + CHAT, json=body)
        except TimeoutError:
            raise Refused(f"no answer within {self.config.timeout_s:g} s", 0.0) from None
        except http.HTTPError as error:
            unreachable = isinstance(error, http.ConnectError | http.UnsupportedProtocol)
            raise Refused(f"{type(error).__name__}: {error}", 0.0, unreachable) from None
        self._answered = True
        if response.status_code == 200:
            reply, usage = read_reply(response.content)
            self._counts.update(usage)
            return reply
        reason = f"HTTP {response.status_code}: {' '.join(response.text.split())[:200]}"
        if response.status_code in HOPELESS or response.status_code < 400:
            raise ConfigError(
                f"{self.url}: {reason}; check the URL, --endpoint.model and the key in {self.config.key_env}"
            )
        raise Refused(reason, retry_after(response.headers) if response.status_code in TRANSIENT else None)

    def _client(self) -> Any:
        http, most = _httpx(), self.config.concurrency
        limits = http.Limits(max_connections=most, max_keepalive_connections=most)
        timeout = http.Timeout(self.config.timeout_s, connect=30.0)
        return http.AsyncClient(headers=self._headers, timeout=timeout, limits=limits)

    def _only_model(self) -> str:
        http = _httpx()
        try:
            response = http.get(f"{self.url}/models", headers=self._headers, timeout=30.0)
            names = [str(each["id"]) for each in response.json()["data"]] if response.status_code == 200 else []
        except http.ConnectError as error:
            raise ConfigError(f"{self.url}: cannot be reached ({error}); is the server up?") from None
        except (http.HTTPError, http.InvalidURL, ValueError, KeyError, TypeError):
            names = []
        if len(names) != 1:
            known = f"it lists {', '.join(names[:10])}" if names else "it lists none"
            raise ConfigError(f"{self.url}: name the model with --endpoint.model; {known}")
        return names[0]


def read_reply(content: bytes) -> tuple[Reply, dict[str, int]]:
    """A response taken apart, and its tokens as the server counts them; Refused for one that is no answer."""
    try:
        body = msgspec.json.decode(content, type=Body)
    except msgspec.MsgspecError as error:
        raise Refused(f"the response cannot be read: {error}", 0.0) from None
    if not body.choices or body.choices[0].finish_reason not in ("stop", "length"):
        why = body.choices[0].finish_reason if body.choices else "no choices"
        raise Refused(f"the response is no answer: {why}")
    message, finish = body.choices[0].message, str(body.choices[0].finish_reason)
    answer, thinking, closed = (message.content or "").strip(), message.reasoning_content or message.reasoning, True
    if thinking is None:
        thinking, answer, closed = split_tags(answer)
    thinking, stopped = thinking.strip(), finish == "stop"
    completion = Completion(thinking, answer, closed, not stopped, stopped and closed and bool(answer))
    usage = body.usage or Usage()
    thought = (usage.completion_tokens_details or Details()).reasoning_tokens
    if thought is None:  # by its share of the text
        thought = round(usage.completion_tokens * len(thinking) / max(1, len(thinking) + len(answer)))
    text = f"<think>{thinking}</think>{answer}" if thinking else answer
    counts = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens, "thinking": thought}
    return Reply(completion, text, finish, usage.completion_tokens, thought), counts


def split_tags(text: str) -> tuple[str, str, bool]:
    """(thought, answer, whether the thought is closed) of a text that may carry its thought in tags."""
    before, closed, after = text.partition("</think>")
    if closed:
        return before.strip().removeprefix("<think>").strip(), after.strip(), True
    if text.startswith("<think>"):
        return text.removeprefix("<think>").strip(), "", False
    return "", text, True


def retry_after(headers: Any) -> float:
    """Seconds the server asks for, as a number or a date, within reason; 0 if it says nothing that can be read."""
    text = headers.get("retry-after", "").strip()
    if text.isdecimal():
        return min(float(text), LONGEST_WAIT_S)
    try:
        seconds = (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):
        return 0.0
    return min(max(seconds, 0.0), LONGEST_WAIT_S)


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of brackets or a port that cannot be
        return False


async def _end(client: Any, pending: set[Any]) -> None:
    """Break off what is under way."""
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    await client.aclose()


def _httpx() -> Any:
    try:
        import httpx2
    except ImportError:
        raise MissingPackage("httpx2", "endpoint") from None
    return httpx2
