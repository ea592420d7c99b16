"""R1-Zero as a whole: it learns, it resumes exactly after kill -9, it refuses what would train the wrong thing."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sputnik.errors import ConfigError, DataError, TaskError
from sputnik.tasks.base import load_task
from sputnik.tasks.verify import VerifierPool
from sputnik.train.loop import Paused
from sputnik.train.reinforcement import Reinforcement
from sputnik.train.rl import RLConfig, train_rl
from sputnik.train.state import read_jsonl

OPTIONS = {"terms": [2, 3], "largest": 5, "non_negative": True, "style_weights": {"guess": 0.5, "steps": 0.5}}
SMALL: dict[str, Any] = {
    "task_options": OPTIONS, "steps": 6, "prompts_per_step": 4, "samples_per_prompt": 4, "optimizer_steps": 2,
    "max_tokens": 40, "lr": 2e-3, "switches": {"reference_refresh": 2}, "eval_every": 3, "eval_questions": 8,
    "eval_samples": 2, "on_collapse": "off", "precision": "fp32",
}  # fmt: skip
TIMED = ("seconds", "usd", "generate_s", "verify_s", "train_s", "tokens_per_s", "flops_per_s", "peak_share")
SCRIPT = """
import json, sys, torch
from pathlib import Path
from sputnik.cost import Meter
from sputnik.hardware import Hardware
from sputnik.train.rl import RLConfig, train_rl
torch.set_num_threads(1)
settings, parent, out = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
train_rl(RLConfig(**settings), parent, out, Meter(Hardware("test", 1e11, None, 1e10, 1e10, 0.1, "test")))
"""


def start(checkpoint: Path, out: Path, **changes: Any) -> subprocess.Popen[bytes]:
    settings = json.dumps({**SMALL, **changes})
    command = [sys.executable, "-c", SCRIPT, settings, str(checkpoint), str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=out.parent)


def outcome(out: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Metrics without what a clock says, rollouts, final weights."""
    metrics = [{k: v for k, v in line.items() if k not in TIMED} for line in read_jsonl(out / "metrics.jsonl")]
    return metrics, read_jsonl(out / "rollouts.jsonl"), load_file(out / "checkpoint" / "model.safetensors")


def require_equal(first: Path, second: Path) -> None:
    (metrics, rollouts, weights), (other_metrics, other_rollouts, other_weights) = outcome(first), outcome(second)
    assert metrics == other_metrics
    assert rollouts == other_rollouts
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


def steps_done(out: Path) -> int:
    return len(read_jsonl(out / "metrics.jsonl"))


def run_with_kills(checkpoint: Path, out: Path, kill_after: list[int], **changes: Any) -> None:
    """Kill -9 as soon as so many steps (step 0 is one) are logged, plus a random moment; then let it finish."""
    rng = random.Random(0)
    for steps in kill_after:
        process = start(checkpoint, out, **changes)
        while process.poll() is None and steps_done(out) < steps:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.2)
        process.kill()
        process.communicate()
    process = start(checkpoint, out, **changes)
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()


def test_killed_run_equals_the_unbroken_one_bit_for_bit(policy, tmp_path: Path) -> None:
    changes = {"save_seconds": 0.0}
    unbroken = start(policy.checkpoint, tmp_path / "unbroken", **changes)
    run_with_kills(policy.checkpoint, tmp_path / "killed", [1, 4], **changes)
    _, errors = unbroken.communicate()
    assert unbroken.returncode == 0, errors.decode()
    require_equal(tmp_path / "unbroken", tmp_path / "killed")
    assert [line["step"] for line in read_jsonl(tmp_path / "killed" / "metrics.jsonl")] == list(range(7))


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_nothing(policy, tmp_path: Path) -> None:
    rng = random.Random(1)
    changes = {"save_seconds": 0.3, "steps": 20, "objective": "dapo"}
    unbroken = start(policy.checkpoint, tmp_path / "unbroken", **changes)
    run_with_kills(policy.checkpoint, tmp_path / "killed", [rng.randint(0, 20) for _ in range(10)], **changes)
    unbroken.communicate()
    require_equal(tmp_path / "unbroken", tmp_path / "killed")


FOUR = """
from dataclasses import replace
from sputnik.tasks.arithmetic import Arithmetic

class Four(Arithmetic):
    name = "four"

    def generate(self, rng):
        return replace(super().generate(rng), gold="4")
"""
"""Pays for the answer 4 to every question: what a policy that half knows sums can learn in a few steps."""


def test_reinforcement_raises_the_accuracy_and_tells_its_story(policy, tmp_path: Path) -> None:
    (tmp_path / "four.py").write_text(FOUR)
    changes = {"steps": 20, "prompts_per_step": 8, "samples_per_prompt": 8, "optimizer_steps": 1, "eval_every": 20}
    settings = {**SMALL, **changes, "lr": 1e-3, "task": str(tmp_path / "four.py")}
    train_rl(RLConfig(**settings), policy.checkpoint, tmp_path / "rl", policy.meter())
    start, *lines = read_jsonl(tmp_path / "rl" / "metrics.jsonl")
    accuracy = [line["accuracy_reward"] for line in lines]
    assert sum(accuracy[-5:]) / 5 > sum(accuracy[:5]) / 5 + 0.4
    assert [line.get("ratio_first") for line in lines] == [0.0] + [None] * 19, "measured once: scoring is training"
    assert all(line["mismatch_p99"] < 1e-3 for line in lines), "sampler and trainer must mean the same policy in fp32"
    assert all(sum(line["verdicts"].values()) == 64 for line in lines)
    assert lines[-1]["validation"]["n"] == 8 and "validation" not in lines[0]
    assert (start["step"], start["validation"]["n"], start["validation"]["k"]) == (0, 8, 2)
    assert start["validation"]["mean"] < lines[-1]["validation"]["high"]
    assert any(line["kl"] > 0 for line in lines)
    rollouts = read_jsonl(tmp_path / "rl" / "rollouts.jsonl")
    assert set(rollouts[0]["rewards"]) == {"accuracy", "format"}
    second = train_rl(RLConfig(**settings), policy.checkpoint, tmp_path / "rl", policy.meter())
    assert second == lines[-1], "a second call changes nothing"


def test_a_reward_that_never_comes_pauses_the_run_and_the_same_command_goes_on(policy, tmp_path: Path) -> None:
    (tmp_path / "never.py").write_text(FOUR.replace('"4"', '"987654321"'))
    settings = {**SMALL, "task": str(tmp_path / "never.py"), "eval_every": 9}
    settings["on_collapse"] = {"action": "pause", "window": 5, "length": "off", "entropy": "off"}
    with pytest.raises(Paused, match="accuracy_reward was 0 in each of the last 5 steps") as error:
        train_rl(RLConfig(**settings), policy.checkpoint, tmp_path / "rl", policy.meter())
    assert "paused at step 5" in str(error.value) and not (tmp_path / "rl/checkpoint").exists()
    train_rl(RLConfig(**settings), policy.checkpoint, tmp_path / "rl", policy.meter())
    assert [line["step"] for line in read_jsonl(tmp_path / "rl/metrics.jsonl")] == list(range(7))
    alarm = json.loads((tmp_path / "rl/alarms/step-5.json").read_text())
    assert (alarm["rule"], alarm["action"]) == ("constant_accuracy_reward", "pause")


def test_dynamic_sampling_trains_on_groups_that_differ(policy, tmp_path: Path) -> None:
    settings = {**SMALL, "objective": "dapo", "steps": 3}
    train_rl(RLConfig(**settings), policy.checkpoint, tmp_path / "rl", policy.meter())
    lines, groups = read_jsonl(tmp_path / "rl" / "metrics.jsonl")[1:], dict[tuple[int, str], list[float]]()
    for rollout in read_jsonl(tmp_path / "rl" / "rollouts.jsonl"):
        groups.setdefault((rollout["step"], rollout["problem_id"]), []).append(rollout["advantage"])
    assert groups and all(any(advantages) for advantages in groups.values())
    drawn = [sum(line["verdicts"].values()) for line in lines]
    assert max(drawn) > 16 and min(drawn) >= 16, "the figures tell of the groups that were dropped, too"
    assert min(line["useful_groups"] for line in lines) < 1 and all(line["useful_groups"] > 0 for line in lines)


def test_a_limit_that_cuts_most_answers_is_refused_before_step_one(policy, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_tokens = 5 cuts off .* of the base model's answers; raise it"):
        train_rl(RLConfig(**{**SMALL, "max_tokens": 5}), policy.checkpoint, tmp_path / "rl", policy.meter())
    assert not (tmp_path / "rl" / "metrics.jsonl").exists()


def test_a_family_with_few_questions_is_probed_with_those_of_a_step(policy, pool: VerifierPool) -> None:
    options = {"terms": [2, 2], "largest": 3, "non_negative": True}
    config = RLConfig(**{**SMALL, "task_options": options, "eval_questions": 1})
    task = load_task("arithmetic", options)
    with pytest.raises(TaskError, match="distinct train problems"):
        task.problems("train", 32)
    assert Reinforcement(config, policy.model(), policy.tok, task, pool).probe()["answers"] == 4 * 4


def test_a_task_whose_gold_is_wrong_is_refused_before_step_one(policy, tmp_path: Path) -> None:
    task = tmp_path / "broken.py"
    task.write_text(
        "from sputnik.tasks.base import Problem, Task\n"
        "class Broken(Task):\n"
        "    name = 'broken'\n"
        "    def generate(self, rng):\n"
        "        number = rng.randint(0, 10**6)\n"
        "        return Problem(prompt=f'Say {number}', gold=str(number))\n"
        "    def verify(self, problem, answer):\n"
        "        return answer == str(int(problem.gold) + 1)\n"
    )
    settings = {**SMALL, "task": str(task), "task_options": {}}
    with pytest.raises(TaskError, match="gold"):
        train_rl(RLConfig(**settings), policy.checkpoint, tmp_path / "rl", policy.meter())


def test_other_settings_in_the_same_place_are_refused(policy, tmp_path: Path) -> None:
    train_rl(RLConfig(**{**SMALL, "steps": 1}), policy.checkpoint, tmp_path / "rl", policy.meter())
    with pytest.raises(DataError, match=r"lr was 0\.002, is 0\.001"):
        train_rl(RLConfig(**{**SMALL, "steps": 1, "lr": 1e-3}), policy.checkpoint, tmp_path / "rl", policy.meter())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps = 0: set it above 0"),
        ({"samples_per_prompt": 1}, "a group needs at least 2 answers"),
        ({"optimizer_steps": 9}, "optimizer_steps = 9 parts of prompts_per_step = 4 groups"),
        ({"objective": "ppo"}, "no objective 'ppo'"),
        ({"switches": {"clip": 1.0}}, "did you mean 'clip_"),
        ({"eval_questions": 0}, "eval_questions = 0: set it above 0"),
        ({"switches": {"overlong_share": -0.5}}, "overlong_share = -0.5: choose a share"),
        ({"temperature": -1.0}, "temperature = -1.0: set it above 0"),
        ({"on_collapse": "stop"}, "on_collapse = 'stop': choose one of off, warn, pause, rollback"),
        ({"on_collapse": {"action": "rollback", "windows": 5}}, "on_collapse: unknown key 'windows'; did you mean"),
        ({"rewards": {"langauge": 1.0}}, "rewards: unknown key 'langauge'; did you mean 'language'"),
        ({"rewards": {"language": 1.0, "target": "tlh"}}, "language 'tlh'"),
        ({"rewards": {"helpful": -1.0}}, "helpful = -1.0: it must not be negative"),
        ({"rewards": {"general_share": 0.0}}, "general_share = 0.0: choose a share"),
    ],
)
def test_settings_that_do_not_fit_are_one_line_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        RLConfig(**{**SMALL, **changes})
    assert "\n" not in str(error.value)
