"""One GRPO step, ours and TRL's: rollout, rewards, loss, backward pass and optimiser, in generated tokens a second.

    python -m benchmarks.grpo_step [--shape dense|v3] [--dtype auto|bf16|fp32] [--rounds 8] [--threads 2] [--json]

Both train the same random model from the same weights on the same prompts: a Llama (hidden 256, 6 layers, byte-level
vocabulary), or with `--shape v3` the preset `mini` of DeepSeek-V3 (59 million parameters with a larger vocabulary).
A step is 8 prompts x 8 samples x 64 new tokens, no KL term, one update. The rounds of two processes alternate, so
what else the machine does hits both; `ratio` is the median of the paired ratios. End-of-sequence is not a stop on our
side and has no probability on theirs, so all 64 tokens are always drawn. Both reward the share of digits in the
answer. auto, the default, is the type this CPU multiplies faster, on both sides. Before anything is timed the two
models must give the same logits. Left out: verifying (an answer that never ends is not sent to a verifier).
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch

from sputnik.engine.params import SamplingParams
from sputnik.engine.rollouts import Rollouts
from sputnik.hardware import kept_memory, resolve_precision
from sputnik.model.checkpoint import load_model, save_model
from sputnik.model.config import ModelConfig
from sputnik.model.transformer import Transformer
from sputnik.tasks.base import Problem, load_task
from sputnik.tasks.verify import VerifierPool
from sputnik.text.chat import render
from sputnik.text.tokenizer import SMALLEST_VOCABULARY, Tokenizer
from sputnik.train.learner import Learner, pack
from sputnik.train.losses import Objective
from sputnik.train.optim import adamw
from sputnik.train.rollout import RolloutWorker, Sample, with_advantages

PROMPTS, GROUP, NEW, LR = 8, 8, 64, 1e-4
GOALS = {"dense": 4.0, "v3": 4.0}
DIGITS = frozenset("0123456789")


@dataclass(frozen=True)
class Round:
    """One step of one side, in seconds; `cpu` adds up all threads."""

    wall: float
    generate: float
    cpu: float


def digit_share(text: str) -> float:
    return sum(character in DIGITS for character in text) / max(1, len(text))


def problems(round_: int) -> list[Problem]:
    numbers = range(round_ * PROMPTS, (round_ + 1) * PROMPTS)
    return [Problem(prompt=f"{n % 97:02d}+{n * 7 % 89:02d}=", gold=str(n % 97 + n * 7 % 89)) for n in numbers]


def make_checkpoint(out: Path, shape: str) -> Tokenizer:
    """A random model in the Hugging Face layout, and a byte-level tokenizer that both sides read."""
    tok = Tokenizer.train([], SMALLEST_VOCABULARY)
    tok.save(out)
    ids = {"bos_token_id": tok.bos_id, "eos_token_id": tok.eos_id, "pad_token_id": tok.pad_id}
    if shape == "v3":
        config = ModelConfig.preset("mini", vocab_size=tok.vocab_size, **ids)
        save_model(Transformer(config).init_weights(torch.Generator().manual_seed(0)), out)
        return tok
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=tok.vocab_size, hidden_size=256, intermediate_size=640, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True, **ids,
    )  # fmt: skip
    LlamaForCausalLM(llama).save_pretrained(out)
    return tok


def check_logits(checkpoint: Path) -> float:
    """Largest difference between the two models' fp32 logits; raises if they are not the same function."""
    from transformers import AutoModelForCausalLM

    ids = torch.randint(0, 256, (4, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)(ids).logits
        difference = float((load_model(checkpoint)(ids) - theirs).abs().max())
    if not difference < 1e-4:
        raise SystemExit(f"the two models differ by {difference:.2e} in their logits: nothing to compare")
    return difference


class Ours:
    """The classes of the RL stage, put together as train/reinforcement.py does for one update per rollout."""

    def __init__(self, checkpoint: Path, tok: Tokenizer, pool: VerifierPool, dtype: str) -> None:
        model = load_model(checkpoint).eval()
        self.objective = Objective.named("grpo", {"kl_beta": 0.0})
        sampler = Rollouts(model, eos_id=-1, precision=dtype)
        self.worker = RolloutWorker(sampler, tok, load_task("arithmetic"), pool, "chat", self.objective)
        self.learner = Learner(model, adamw(model, LR, weight_decay=0.0), self.objective, precision=dtype)
        self.tok = tok

    def step(self, number: int) -> Round:
        cpu, start = time.process_time(), time.perf_counter()
        groups = self.worker.collect(problems(number), GROUP, SamplingParams(max_tokens=NEW, seed=number))
        samples = [sample for group in groups for sample in with_advantages([self._rewarded(s) for s in group], True)]
        batches = pack(samples, self.objective, NEW, 16384)
        stats = self.learner.update(batches)
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        if stats.tokens != PROMPTS * GROUP * NEW or stats.ratio_error != 0:
            raise SystemExit(f"our step is not the one to measure: {stats}")
        return Round(wall, self.worker.generate_s, cpu)

    def _rewarded(self, sample: Sample) -> Sample:
        share = digit_share(self.tok.decode(sample.generation.ids))
        return replace(sample, rewards={"digits": share}, reward=share)


class Theirs:
    """TRL in a process of its own: what one side sets (the allocator, threads) does not reach the other."""

    def __init__(self, checkpoint: Path, dtype: str, rounds: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._line, line = context.Pipe()
        self.process = context.Process(
            target=run_theirs, args=(line, checkpoint, dtype, rounds, torch.get_num_threads())
        )
        self.process.start()
        line.close()
        self._answer()

    def step(self) -> Round:
        self._line.send("go")
        answer: Round = self._answer()
        return answer

    def _answer(self) -> Any:
        try:
            return self._line.recv()
        except EOFError:
            raise SystemExit("TRL has ended before its last step: what it said stands above") from None

    def cpu(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system


def run_theirs(line: Connection, checkpoint: Path, dtype: str, rounds: int, threads: int) -> None:
    """Train with TRL, a step whenever `line` says so; a `Round` comes back for each, and None when it is ready."""
    torch.set_num_threads(threads)
    tok = Tokenizer.load(checkpoint)
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    generated: list[float] = []

    class Trainer(GRPOTrainer):  # type: ignore[misc]
        def _generate(self, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            out = super()._generate(*args, **kwargs)
            generated.append(time.perf_counter() - start)
            return out

    class Clock(TrainerCallback):  # type: ignore[misc]
        """From the word to begin to the next begin of a step: with data loading and logging, as ours."""

        def __init__(self) -> None:
            self.started: tuple[float, float] | None = None

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self._stop()
            line.recv()
            self.started = time.perf_counter(), time.process_time()

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            self._stop()

        def _stop(self) -> None:
            if self.started is None:
                line.send(None)
                return
            wall, cpu = (now - then for now, then in zip(_clocks(), self.started, strict=True))
            line.send(Round(wall, generated[-1], cpu))

    def reward(completions: Sequence[str], **_: Any) -> list[float]:
        return [digit_share(text) for text in completions]

    rows = [{"prompt": _prompt_text(tok, problem)} for n in range(64) for problem in problems(n)]
    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            output_dir=out, use_cpu=True, bf16=dtype == "bf16", fp16=False, report_to=[], save_strategy="no",
            logging_steps=1000, disable_tqdm=True, learning_rate=LR, max_steps=rounds, num_generations=GROUP,
            per_device_train_batch_size=GROUP * PROMPTS, gradient_accumulation_steps=1, max_completion_length=NEW,
            beta=0.0, temperature=1.0, gradient_checkpointing=False, generation_kwargs={"min_new_tokens": NEW},
        )  # fmt: skip
        Trainer(
            model=AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), reward_funcs=reward,
            args=config, train_dataset=Dataset.from_list(rows), callbacks=[Clock()],
            processing_class=AutoTokenizer.from_pretrained(checkpoint, padding_side="left"),
        ).train()  # fmt: skip


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _prompt_text(tok: Tokenizer, problem: Problem) -> str:
    """The prompt as text that their tokenizer reads back to the very ids we sample from."""
    prompt = render(tok, [{"role": "user", "content": problem.prompt}])
    return tok.decode(prompt.ids)


def busy_others(peer: Theirs, since: tuple[float, float, float] | None = None) -> tuple[float, float, float]:
    """Cores that third processes kept busy since `since`, on average; then wall seconds and busy seconds till now."""
    fields = [int(field) for field in Path("/proc/stat").read_text(encoding="ascii").split()[1:9]]
    busy = (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
    times = os.times()
    others, now = busy - times.user - times.system - peer.cpu(), time.perf_counter()
    return (others - since[2]) / (now - since[1]) if since else 0.0, now, others


def phases(rounds: Sequence[Round]) -> dict[str, float]:
    return {
        "step_s": round(statistics.median(r.wall for r in rounds), 3),
        "generate_s": round(statistics.median(r.generate for r in rounds), 3),
        "train_s": round(statistics.median(r.wall - r.generate for r in rounds), 3),
        "cpu_s": round(statistics.median(r.cpu for r in rounds), 3),
    }


def compare(shape: str, dtype: str, rounds: int, report: Callable[[str], None]) -> dict[str, Any]:
    """Run both sides, `rounds` timed steps each after one that warms up; returns the JSON line."""
    import trl

    ours, theirs = list[Round](), list[Round]()
    with tempfile.TemporaryDirectory() as folder, VerifierPool("arithmetic") as pool, kept_memory():
        checkpoint = Path(folder)
        tok = make_checkpoint(checkpoint, shape)
        difference = check_logits(checkpoint)
        us, peer = Ours(checkpoint, tok, pool, dtype), Theirs(checkpoint, dtype, rounds + 1)
        noise = busy_others(peer)
        for number in range(rounds + 1):
            ours.append(us.step(number))
            report(f"round {number}: ours {ours[-1].wall:.2f} s, generation {ours[-1].generate:.2f} s")
            theirs.append(peer.step())
        others = busy_others(peer, noise)[0]
        peer.process.join()
    ours, theirs = ours[1:], theirs[1:]
    tokens = PROMPTS * GROUP * NEW
    ratios = sorted(their.wall / our.wall for our, their in zip(ours, theirs, strict=True))
    our_phases, their_phases = phases(ours), phases(theirs)
    return {
        "case": "grpo_step", "shape": shape, "peer": f"trl {trl.__version__}", "dtype": dtype,
        "ours": round(tokens / our_phases["step_s"], 1), "theirs": round(tokens / their_phases["step_s"], 1),
        "ratio": round(statistics.median(ratios), 2), "goal": GOALS[shape], "unit": "tok/s",
        "ratio_range": [round(ratios[0], 2), round(ratios[-1], 2)],
        "cpu_ratio": round(their_phases["cpu_s"] / our_phases["cpu_s"], 2),
        "ours_phases": our_phases, "theirs_phases": their_phases, "rounds": rounds, "threads": torch.get_num_threads(),
        "logit_difference": difference, "other_cores": round(others, 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=tuple(GOALS), default="dense")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="nothing but the JSON line, no progress on stderr")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds: at least 1, after one that warms up")
    torch.set_num_threads(args.threads)
    quiet = args.json
    dtype = resolve_precision(args.dtype)
    line = compare(args.shape, dtype, args.rounds, lambda text: None if quiet else print(text, file=sys.stderr))
    print(json.dumps(line))


if __name__ == "__main__":
    main()
