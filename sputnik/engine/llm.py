"""A model to call: text or messages in, answers out.

    from sputnik import LLM, SamplingParams

    llm = LLM("path/of/a/checkpoint")                       # or a GGUF file, or a name: "smollm2"
    for result in llm.generate(["The sky is", "The sea is"], SamplingParams(max_tokens=32)):
        print(result.text)
    result = llm.chat([{"role": "user", "content": "What is 7+5?"}])
    print(result.thinking, result.text)
    for piece in llm.stream([{"role": "user", "content": "What is 7+5?"}]):
        print(piece.text, end="", flush=True)

All that was started runs together (continuous batching), whoever asks for the next piece. Models whose tokenizer has
DeepSeek's dialogue tokens are spoken to through text/chat.py, others through the chat template they bring. Tools are
told with `tools=` in OpenAI's form; what the model calls is in `result.calls`. One thread. Left out: many threads and
clients, which are a server's business.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from operator import index
from pathlib import Path
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch

from sputnik.config import from_dict
from sputnik.engine.config import EngineConfig
from sputnik.engine.constrain import Grammars
from sputnik.engine.engine import Engine
from sputnik.engine.outputs import Output, Piece, Reader, Result
from sputnik.engine.params import SamplingParams
from sputnik.engine.sample import Event, Request, Sample
from sputnik.engine.stride import STRIDE
from sputnik.engine.thinking import ThoughtTokens
from sputnik.errors import ConfigError, DataError
from sputnik.model import kernels
from sputnik.model.checkpoint import check_tokenizer, load_model
from sputnik.text.chat import Channel, Prompt, answer_block, render
from sputnik.text.foreign import render_own
from sputnik.text.named_models import find_model
from sputnik.text.tokenizer import Tokenizer
from sputnik.text.tools import definitions

Messages = Sequence[Mapping[str, Any]]
Asked = str | Prompt | Sequence[int]


class LLM:
    def __init__(
        self,
        model: str | Path,
        template: Literal["auto", "chat", "zero", "own"] = "auto",
        device: str = "cpu",
        **engine: Any,
    ) -> None:
        """`model`: a checkpoint directory, a GGUF file or a name. `engine`: fields of `EngineConfig`, for instance
        `weights="int4"`, `exact=True`. `template`: that of text/chat.py the model was taught, or its own. `device`:
        cpu, or a GPU as torch names it (cuda, cuda:1)."""
        if template not in ("auto", "chat", "zero", "own"):
            raise ConfigError(f"template = {template!r}: choose auto, chat, zero or own")
        path = find_model(model)
        self.tok = Tokenizer.load(path)
        place = _device(device)
        packs = place.type == "cpu" and kernels.load()  # from any type: fp32 in between would take twice the memory
        loaded = load_model(path, None if packs else torch.float32)
        check_tokenizer(loaded.config, self.tok.vocab_size, path)
        loaded.to(place)
        auto = "chat" if self.tok.has_dialogue else "own"
        self.template = auto if template == "auto" else template
        self.thought = ThoughtTokens.of(self.tok) if self.tok.has_thoughts else None
        config = from_dict(EngineConfig, engine, "LLM")
        self.engine = Engine(loaded, sorted({self.tok.eos_id, *loaded.config.end_ids}), config)
        self.engine.runner.release()
        self.context = loaded.config.max_position_embeddings
        """Tokens that prompt and answer may have together."""
        self._grammars: Grammars | None = None
        self._streams: WeakValueDictionary[int, Stream] = WeakValueDictionary()
        self._wishes: deque[tuple[Callable[[int], object], int]] = deque()
        self._stepping = False

    def generate(
        self, prompts: Sequence[Asked], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Result]:
        """Go on from each prompt: a text (with BOS in front if the model was trained so), ids, or what `render` gave.

        `params` are those of all prompts, or one for each. A prompt that can never be answered raises a DataError or
        ConfigError with its index before anything runs."""
        each = [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else params
        if isinstance(prompts, str):
            raise ConfigError("generate takes a list of prompts: put the text into [ ]")
        if len(each) != len(prompts):
            raise ConfigError(f"generate: {len(each)} params for {len(prompts)} prompts")
        streams: list[Stream] = []
        try:
            for place, prompt in enumerate(prompts):
                try:
                    streams.append(self.start(prompt, each[place]))
                except (DataError, ConfigError) as error:
                    raise type(error)(f"prompt {place}: {error}") from None
            return [stream.result() for stream in streams]
        finally:
            for stream in streams:
                stream.close()

    def chat(
        self,
        messages: Messages | str,
        params: SamplingParams | None = None,
        thinking: bool = True,
        tools: Messages = (),
    ) -> Result:
        """The model's turn after `messages` ({"role", "content"}), or its answer to a question. Many at once:
        `generate([render(m) for m in ...])`.

        What earlier turns have computed is taken from the cache."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self._ask(messages, params, thinking, tools).result()

    def stream(
        self,
        asked: Messages | str | Prompt,
        params: SamplingParams | None = None,
        thinking: bool = True,
        tools: Messages = (),
    ) -> "Stream":
        """`chat`, or `generate` of one text, piece by piece. With template zero the answer's pieces have its tags."""
        if params is not None and params.best_of is not None:
            raise ConfigError("best_of is decided at the end, so it cannot be streamed: leave it out")
        if not isinstance(asked, str | Prompt):
            return self._ask(asked, params, thinking, tools)
        if tools:
            raise ConfigError("tools are told with messages: render them, and give their names to `start`")
        return self.start(asked, params)

    def _ask(self, messages: Messages, params: SamplingParams | None, thinking: bool, tools: Messages) -> "Stream":
        names = {each["name"] for each in definitions(tools)} if tools else None
        return self.start(self.render(messages, thinking, tools), params, names)

    def render(self, messages: Messages, thinking: bool = True, tools: Messages = ()) -> Prompt:
        """The ids a conversation is for this model."""
        if self.template == "own":
            if tools:
                raise ConfigError("this model is spoken to through its own template, which is not given tools here")
            return render_own(self.tok, messages, thinking=thinking)
        return render(self.tok, messages, template=self.template, thinking=thinking, tools=tools)

    def start(
        self, prompt: Asked, params: SamplingParams | None = None, tools: Collection[str] | None = None
    ) -> "Stream":
        """Queue one prompt; it goes on whenever anything of this model is waited for. `tools`: names that may be
        called; None: the answer is text, whatever stands in it."""
        stream = Stream(self, prompt, params or SamplingParams(), tools)
        self._streams[stream.number] = stream
        return stream

    def step(self, most: int = 1) -> list["Stream"]:
        """Compute one batch of all that runs and hand out what it brought; returns those that ended with it. `most`:
        tokens it may bring of each at once, for who waits for whole answers.

        An exception in the middle, Ctrl-C for instance, ends all that runs: a step is done wholly or not at all."""
        ended: dict[int, Stream] = {}
        self._stepping = True
        try:
            for event in self.engine.step(most):
                stream = self._streams.get(event.request)
                if stream is not None:
                    stream.take(event)
                    if stream.done:
                        ended[event.request] = stream
        except BaseException:
            for stream in list(self._streams.values()):
                stream.close()
            raise
        finally:
            self._stepping = False
            self._grant()
        return list(ended.values())

    def encode(self, text: str) -> list[int]:
        """Ids of a plain text, BOS in front if the model was trained so."""
        return [*self.tok.text_start, *self.tok.encode(text)]

    def request(self, prompt: Asked, params: SamplingParams) -> Request:
        """The engine's request of a prompt."""
        if not isinstance(params, SamplingParams):
            raise ConfigError(f"params: give SamplingParams(...), not {type(params).__name__}")
        if not isinstance(prompt, Prompt):
            try:
                ids = self.encode(prompt) if isinstance(prompt, str) else [index(id) for id in prompt]
            except TypeError:
                raise ConfigError("a prompt is a text, a list of token ids, or what `render` gave") from None
            prompt = Prompt.of(self.tok, ids)
        matchers = []
        if params.constrained:
            self._grammars = self._grammars or Grammars(self.tok)
            matchers = [each for _ in range(params.samples) if (each := self._grammars.start(params)) is not None]
        return Request(prompt.ids, params, prompt.in_thought, self.thought, matchers)

    def between_steps(self, action: Callable[[int], object], number: int) -> None:
        """Do something to a request: now, or when the step under way is over. A signal handler may call this."""
        self._wishes.append((action, number))
        if not self._stepping:
            self._grant()

    def _grant(self) -> None:
        while self._wishes:
            action, number = self._wishes.popleft()
            action(number)


class Stream(Iterator[Piece]):
    """One request on its way: iterate over its pieces, or ask for its `result`. Forgetting it ends the request."""

    def __init__(self, llm: LLM, prompt: Asked, params: SamplingParams, tools: Collection[str] | None = None) -> None:
        self._closed, self._samples = False, list[Sample]()  # done until it is begun
        request = llm.request(prompt, params)
        self.prompt = request.prompt
        self._llm, self._params = llm, params
        self._split = isinstance(prompt, Prompt) and llm.thought is not None
        self._readers = [
            Reader(llm.tok, params, request.in_thought if self._split else None, tools) for _ in range(params.samples)
        ]
        self._pieces: deque[Piece] = deque()
        self.number = llm.engine.add(request)
        self._samples = llm.engine.samples(self.number)

    @property
    def done(self) -> bool:
        return self._closed or all(each.finish is not None for each in self._samples)

    def __next__(self) -> Piece:
        while not self._pieces:
            if self.done:
                raise StopIteration
            self._llm.step()
        return self._pieces.popleft()

    def result(self) -> Result:
        """Wait for the end; after `close`, what there is."""
        while not self.done:
            self._llm.step(STRIDE)
        outputs = [self._output(*each) for each in zip(self._samples, self._readers, strict=True)]
        if self._params.best_of is not None:
            ranked = sorted(zip(outputs, self._samples, strict=True), key=lambda pair: -_mean_logprob(*pair))
            outputs = [output for output, _ in ranked]
        leader = self._samples[0]
        tops = [list(zip(*top, strict=True)) for top in leader.prompt_top]
        return Result(
            list(self.prompt), leader.sequence.cached, leader.prompt_logprobs, tops, outputs[: self._params.n]
        )

    def answer_now(self) -> None:
        """Close the thought: what comes next is the answer. A signal handler may call this."""
        self._llm.between_steps(self._llm.engine.answer_now, self.number)

    def close(self) -> None:
        """End the request, if it still runs. A signal handler may call this."""
        if not self.done:
            self._closed = True
            self._llm.between_steps(self._llm.engine.abort, self.number)

    __del__ = close

    def take(self, event: Event) -> None:
        """For `LLM.step`: the next tokens of this request, or its end."""
        reader, finish = self._readers[event.sample], event.finish
        if self._closed or reader.finish is not None:  # ended here, not yet there
            return
        called, found = len(reader.calls), list[tuple[Channel, str]]()
        for id in event.ids:
            found += reader.feed(id)
            if reader.stopped:  # what was drawn beyond a stop string in the same step is nobody's
                finish = "stop"
                self._llm.engine.end(event.of, finish)
                break
        if finish is not None:
            found += reader.end(finish)
        self._pieces += [Piece(channel, text, event.sample) for channel, text in found]
        self._pieces += [Piece("answer", "", event.sample, call=call) for call in reader.calls[called:]]
        if finish is not None:
            self._pieces.append(Piece(reader.channel, "", event.sample, finish))

    def _output(self, sample: Sample, reader: Reader) -> Output:
        if reader.finish is None:  # ended without a word: closed, or one of several that never began
            reader.end(sample.finish or "aborted")
        assert reader.finish is not None
        answer = reader.text("answer")
        if self._split and self._llm.template == "zero":
            answer, _ = answer_block(answer)
        end, params = reader.taken, self._params
        return Output(
            ids=sample.written[:end],
            thinking=reader.text("thinking"),
            answer=answer,
            calls=reader.calls,
            finish=reader.finish,
            logprobs=sample.logprobs[:end] if params.logprobs is not None else [],
            top=sample.top[:end],
        )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"device = {name!r} cannot be used here ({reason}): choose cpu, or see `sputnik doctor`"
        ) from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device = {name!r}: choose cpu or cuda")
    return device


def _mean_logprob(output: Output, sample: Sample) -> float:
    scores = sample.logprobs[: len(output.ids)]
    return sum(scores) / len(scores) if scores and output.finish != "failed" else float("-inf")
