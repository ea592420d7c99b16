"""Reward models on a V3 shape of 50k weights, on texts where one word decides and length does not."""

import dataclasses
import json
import math
import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sputnik.errors import CheckpointError, ConfigError, DataError
from sputnik.model.checkpoint import save_model
from sputnik.model.config import ModelConfig
from sputnik.model.kernels import fused
from sputnik.model.transformer import Transformer
from sputnik.text.chat import render, render_example
from sputnik.text.preferences import CARD, Judged, Kind, judged
from sputnik.train.examples import Policy, read_records
from sputnik.train.reward_data import Data, balance, gather
from sputnik.train.reward_model import RewardModel, RewardModelConfig, RewardTraining, train_reward_model
from sputnik.train.scorer import HEAD

Base = Any  # conftest.Base: this directory is no package to import it from
WORDS = ("is", "plus", "1", "2", "3", "4", "5", ".")
SETTINGS: dict[str, Any] = {"lr": 5e-3, "batch": 32, "epochs": 3, "precision": "fp32", "evaluations": 2}


def filler(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(2, 8)))


def pairs(count: int, seed: int = 0, longer: bool = False) -> list[dict[str, Any]]:
    """The chosen answer ends with "7 7", the rejected one with "8 8"."""
    rng = random.Random(seed)
    tail = " 1 2 3 4 5 1 2 3" if longer else ""
    return [
        {
            "prompt": f"{rng.randint(0, 999)} plus?",
            "chosen": f"{filler(rng)}{tail} 7 7",
            "rejected": f"{filler(rng)} 8 8",
            "defect": rng.choice(("rude", "cut")),
        }
        for _ in range(count)
    ]


def labels(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """What decides stands in the thought."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        safe = rng.random() < 0.5
        thought = f"{filler(rng)} {'7 7' if safe else '8 8'}"
        answer = f"<think>\n{thought}\n</think>\n\n{filler(rng)}"
        found.append({"prompt": f"{rng.randint(0, 999)} plus?", "response": answer, "safe": safe})
    return found


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def parent(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("parent") / "checkpoint"
    model = Transformer(base.model_config).init_weights(torch.Generator().manual_seed(0))
    save_model(model, folder, tokenizer=base.tok)
    return folder


@pytest.fixture(scope="module")
def helpful(base: Base, parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("helpful")
    file = write(out / "pairs.jsonl", pairs(500))
    train_reward_model(RewardModelConfig(**SETTINGS), parent, [file], out / "rm", base.meter())
    return out / "rm"


@pytest.fixture(scope="module")
def safety(base: Base, parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("safety")
    file = write(out / "labels.jsonl", labels(600))
    config = RewardModelConfig(form="pointwise", **SETTINGS | {"epochs": 5})
    train_reward_model(config, parent, [file], out / "rm", base.meter())
    return out / "rm"


def read_judged(kind: Kind, file: Path, bad_lines: Policy = "refuse") -> tuple[list[Judged], list[str]]:
    found = read_records([file], partial(judged, kind), bad_lines)
    return [item for _, item in found.kept], found.bad


def scores_of(stage: Path) -> dict[str, Any]:
    return json.loads((stage / "scores.json").read_text(encoding="utf-8"))


def test_a_pairwise_model_learns_what_length_does_not_tell(helpful: Path) -> None:
    scores = scores_of(helpful)
    assert scores["accuracy"]["low"] > max(0.75, scores["length_baseline"])
    assert 0.3 < scores["longer_wins"]["mean"] < 0.7 and abs(scores["length_correlation"]) < 0.4
    assert set(scores["groups"]) == {"rude", "cut"}
    assert scores["std"] > 0.1, "the scale reinforcement learning divides by"


def test_a_pointwise_model_judges_the_thought_too_and_is_calibrated(safety: Path) -> None:
    scores = scores_of(safety)
    assert scores["accuracy"]["low"] > max(0.75, scores["majority"]) and scores["ranking"] > 0.85
    assert scores["calibration"]["expected_error"] < 0.15 and scores["calibration"]["brier"] < 0.15
    assert sum(each["n"] for each in scores["calibration"]["bins"]) == scores["counts"]["held_out"]


def test_a_thought_moves_the_safety_score_and_not_the_helpful_one(helpful: Path, safety: Path) -> None:
    question = [{"role": "user", "content": "1 plus?"}]
    answers = [f"<think>\n{thought}\n</think>\n\n3 is 3" for thought in ("7 7", "8 8")]
    judge, guard = (RewardModel.load(stage, precision="fp32") for stage in (helpful, safety))
    good, bad = judge.score_texts([question] * 2, answers)
    assert good == bad
    good, bad = guard.score_texts([question] * 2, answers)
    assert good > bad + 1


def test_before_training_every_score_is_zero_and_the_loss_is_log_two(parent: Path, tmp_path: Path) -> None:
    model = RewardModel.of(parent, "pairwise", precision="fp32")
    data = gather(model, [write(tmp_path / "pairs.jsonl", pairs(40))])
    stage = RewardTraining(RewardModelConfig(**SETTINGS), model, data)
    loss, right = stage.accumulate(data.train)
    assert loss == pytest.approx(math.log(2)) and right == 0.5


@pytest.mark.parametrize("kind", ["pairwise", "pointwise"])
@pytest.mark.parametrize("thinking", [None, "4 plus 4", ""])
def test_ids_and_text_of_one_answer_are_one_dialogue(parent: Path, kind: Any, thinking: str | None) -> None:
    model = RewardModel.of(parent, kind, precision="fp32")
    messages = [{"role": "user", "content": "1 plus 2?"}]
    written, own = render_example(model.tok, "1 plus 2?", thinking, "It is 3.")
    prompt, response = written[: own.index(True)], written[own.index(True) :]
    text = "It is 3." if thinking is None else f"<think>\n{thinking}\n</think>\n\nIt is 3."
    by_text = model.from_text(messages, text)
    assert by_text == model.from_ids(prompt, response) == model.from_ids(prompt, response[:-1])
    assert by_text.ids[-1] == model.tok.eos_id
    judged = model.tok.decode(by_text.ids[by_text.prompt :], skip_special=True)
    assert ("4 plus 4" in judged) == (kind == "pointwise" and thinking == "4 plus 4")


def test_a_thought_that_never_ended_has_no_answer_to_judge(parent: Path) -> None:
    model = RewardModel.of(parent, "pairwise", precision="fp32")
    prompt = render(model.tok, [{"role": "user", "content": "1?"}]).ids
    dialogue = model.from_ids(prompt, model.tok.encode("4 plus 4 is"))
    assert dialogue.ids[dialogue.prompt :] == (model.tok.eos_id,)


DENSE = dict(
    model_type="llama", kv_lora_rank=None, q_lora_rank=None, qk_nope_head_dim=0, qk_rope_head_dim=0, v_head_dim=0,
    n_routed_experts=None, num_nextn_predict_layers=0, head_dim=16,
)  # fmt: skip


@pytest.mark.parametrize("shape", [{}, DENSE], ids=["v3", "dense"])
def test_packed_padded_and_alone_give_the_same_scores(
    base: Base, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shape: dict[str, Any]
) -> None:
    config = ModelConfig(**(dataclasses.asdict(base.model_config) | shape))
    backbone = Transformer(config).init_weights(torch.Generator().manual_seed(1))
    save_model(backbone, tmp_path / "parent", tokenizer=base.tok)
    model = RewardModel.of(tmp_path / "parent", "pairwise", precision="fp32")
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(2))
    rng = random.Random(0)
    questions = [[{"role": "user", "content": f"{n % 3} plus?"}] for n in range(12)]
    answers = [filler(rng) for _ in questions]
    alone = [model.score_texts([question], [answer])[0] for question, answer in zip(questions, answers)]
    together = model.score_texts(questions, answers)
    with monkeypatch.context() as patched:
        patched.setattr(fused, "usable", lambda x: False)
        slow = model.score_texts(questions, answers)
    assert together == pytest.approx(slow, abs=1e-5) and together == pytest.approx(alone, abs=1e-5)
    assert max(together) - min(together) > 1e-3, "a constant would be equal too"
    scored = model([model.from_text(question, answer) for question, answer in zip(questions, answers)])
    assert scored.requires_grad and scored.tolist() == pytest.approx(slow, abs=1e-5)


def test_scoring_keeps_no_gradient(helpful: Path) -> None:
    model = RewardModel.load(helpful)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    tok = model.tok
    prompt = render(tok, [{"role": "user", "content": "1 plus?"}]).ids
    scores = model.score([prompt], [[*tok.encode("4\n"), tok.end_think_id, *tok.encode("\n\n7 7"), tok.eos_id]])
    assert isinstance(scores[0], float)
    assert not model([model.from_ids(prompt, tok.encode("7"))]).requires_grad


def test_the_checkpoint_gives_the_scores_it_was_saved_with(helpful: Path) -> None:
    model = RewardModel.load(helpful, precision="fp32")
    items, _ = read_judged("pairwise", helpful.parent / "pairs.jsonl")
    scores = model.score_texts(
        [item.messages for item in items] * 2, [a for n in (0, 1) for a in (i.answers[n] for i in items)]
    )
    standard = model.standardised(scores)
    assert abs(sum(standard) / len(standard)) < 0.1
    assert 0.8 < (sum(x * x for x in standard) / len(standard)) ** 0.5 < 1.2
    half = len(items)
    right = sum(chosen > rejected for chosen, rejected in zip(scores[:half], scores[half:])) / half
    assert right > 0.85


def test_a_stopped_run_goes_on_to_the_same_bits(
    base: Base, parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "pairs.jsonl", pairs(120))
    config = RewardModelConfig(**SETTINGS | {"epochs": 2, "save_seconds": 0.0})
    train_reward_model(config, parent, [file], tmp_path / "whole", base.meter())

    class Killed(Exception):
        pass

    step = RewardTraining.step

    def dies(self: RewardTraining, number: int, loop: Any) -> dict[str, Any]:
        if number == 4:
            raise Killed
        return step(self, number, loop)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(RewardTraining, "step", dies)
        patched.setattr("sputnik.train.loop.SAVE_SHARE", math.inf)  # a save after every step, however slow the disk
        train_reward_model(config, parent, [file], tmp_path / "broken", base.meter())
    assert not (tmp_path / "broken" / "checkpoint").exists()
    assert (tmp_path / "broken" / "resume" / "step-00000003").is_dir()
    train_reward_model(config, parent, [file], tmp_path / "broken", base.meter())
    for name in ("model.safetensors", HEAD, CARD):
        whole, broken = (tmp_path / run / "checkpoint" / name for run in ("whole", "broken"))
        assert whole.read_bytes() == broken.read_bytes(), name
    before = (tmp_path / "broken" / "scores.json").read_bytes()
    train_reward_model(config, parent, [file], tmp_path / "broken", base.meter())
    assert (
        (tmp_path / "broken" / "scores.json").read_bytes()
        == before
        == (tmp_path / "whole" / "scores.json").read_bytes()
    )
    with pytest.raises(DataError, match="begun with other settings"):
        train_reward_model(
            RewardModelConfig(**SETTINGS | {"lr": 1e-4}), parent, [file], tmp_path / "broken", base.meter()
        )


def test_micro_batches_change_no_gradient(parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "pairs.jsonl", pairs(24))
    found = []
    for budget in (10**6, 64):
        monkeypatch.setattr("sputnik.train.scorer.MICRO_TOKENS", budget)
        model = RewardModel.of(parent, "pairwise", precision="fp32")
        torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(2))
        stage = RewardTraining(RewardModelConfig(**SETTINGS), model, gather(model, [file]))
        stage.accumulate(stage.data.train)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


# --- data ---


def data(parent: Path, tmp_path: Path, records: list[dict[str, Any]], **more: Any) -> Data:
    return gather(RewardModel.of(parent, "pairwise"), [write(tmp_path / "pairs.jsonl", records)], **more)


def test_balanced_pairs_leave_nothing_to_length(parent: Path, tmp_path: Path) -> None:
    lopsided = [*pairs(200, longer=True), *pairs(200, 1)]
    raw = data(parent, tmp_path, lopsided, balanced=False).train
    even = balance(raw, seed=0)
    longer = [unit.lengths[0] > unit.lengths[1] for unit in even if unit.lengths[0] != unit.lengths[1]]
    assert sum(longer) * 2 == len(longer) > 40
    gaps = [unit.lengths[0] - unit.lengths[1] for unit in even]
    before = [unit.lengths[0] - unit.lengths[1] for unit in raw]
    assert abs(sum(gaps)) / len(gaps) < 0.2 * abs(sum(before)) / len(before)
    assert balance(raw, seed=0) == even != balance(raw, seed=1)


def test_pairs_of_one_length_direction_are_refused_with_the_fix(parent: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing is left to train on .*dropped_for_balance.*balance_lengths = false"):
        data(parent, tmp_path, pairs(30, longer=True))


def test_no_prompt_is_on_both_sides_and_every_line_is_accounted_for(parent: Path, tmp_path: Path) -> None:
    records = [*pairs(300), {"prompt": "5?", "chosen": "1 " * 100, "rejected": "2"}]
    found = data(parent, tmp_path, records, share=0.2)
    sides = [{unit.source.key for unit in side} for side in (found.train, found.held_out)]
    assert not sides[0] & sides[1] and sides[1]
    counts = found.counts
    assert counts["too_long"] == 1, "longer than the model's 64 positions"
    lost = counts["too_long"] + counts["dropped_for_balance"] + counts["bad_lines"]
    assert counts["train"] + counts["held_out"] + lost == counts["lines"] == 301


def test_held_out_files_are_never_trained_on(parent: Path, tmp_path: Path) -> None:
    shared = pairs(20, 7)
    outside = write(tmp_path / "held.jsonl", shared)
    found = data(parent, tmp_path, [*pairs(100), *shared], held_out=[outside])
    assert found.counts["also_held_out"] >= 20 and found.counts["held_out"] == 20
    assert not {unit.source.key for unit in found.train} & {unit.source.key for unit in found.held_out}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "Expecting property name"),
        ("[1]", "not a JSON object"),
        ('{"chosen": "a", "rejected": "b"}', 'needs either "prompt" or "messages"'),
        ('{"prompt": "q", "messages": [], "chosen": "a", "rejected": "b"}', 'needs either "prompt" or "messages"'),
        ('{"prompt": "q", "chosen": "a"}', '"rejected" must be a text that is not empty'),
        ('{"prompt": "q", "chosen": " ", "rejected": "b"}', '"chosen" must be a text that is not empty'),
        ('{"prompt": "q", "chosen": "a", "rejected": "a"}', "are the same text"),
        ('{"prompt": "q", "chosen": "\\ud800", "rejected": "a"}', "half of a surrogate pair"),
        ('{"messages": [{"role": "assistant", "content": "x"}], "chosen": "a", "rejected": "b"}', "end with the user"),
        ('{"messages": ["x"], "chosen": "a", "rejected": "b"}', "must be a list of"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, line: str, reason: str) -> None:
    good = json.dumps({"prompt": "q", "chosen": "a", "rejected": "b", "source": "kept and ignored"})
    file = tmp_path / "pairs.jsonl"
    file.write_text(f"{good}\n\n{line}\n{good}\n", encoding="utf-8")
    with pytest.raises(DataError, match=f"pairs.jsonl:3: .*{reason}"):
        read_judged("pairwise", file)
    found, bad = read_judged("pairwise", file, "drop")
    assert len(found) == 2 and len(bad) == 1 and "pairs.jsonl:3: " in bad[0]


def test_a_line_that_no_template_can_say_is_named_with_its_number(parent: Path, tmp_path: Path) -> None:
    robot = {"messages": [{"role": "robot", "content": "x"}, {"role": "user", "content": "q"}]}
    records = [*pairs(40), {**robot, "chosen": "a", "rejected": "b"}]
    with pytest.raises(DataError, match="pairs.jsonl:41: a message needs a role"):
        data(parent, tmp_path, records)
    found = data(parent, tmp_path, records, bad_lines="drop")
    assert found.counts["bad_lines"] == 1 and "pairs.jsonl:41: " in found.bad[0]


def test_a_label_must_be_true_or_false(tmp_path: Path) -> None:
    file = write(tmp_path / "labels.jsonl", [{"prompt": "q", "response": "a", "safe": 1}])
    with pytest.raises(DataError, match='jsonl:1: "safe" must be true or false'):
        read_judged("pointwise", file)


# --- what cannot be used ---


@pytest.mark.parametrize(
    ("change", "message"),
    [({"lr": 0}, "lr = 0"), ({"held_out": 1}, "held_out = 1"), ({"template": "x"}, "unknown template")],
)
def test_impossible_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RewardModelConfig(**change)


def test_no_data_at_all_is_refused_before_a_model_is_read(base: Base, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs data"):
        train_reward_model(RewardModelConfig(), tmp_path / "nowhere", [], tmp_path / "out", base.meter())


def test_what_is_no_reward_model_is_said_so(parent: Path, helpful: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not there; make it with `sputnik reward-model`"):
        RewardModel.load(parent)
    for name, damage in ((CARD, b'{"kind": "pairwise"'), (HEAD, b"\x00" * 20)):
        shutil.copytree(helpful / "checkpoint", tmp_path / name)
        (tmp_path / name / name).write_bytes(damage)
        with pytest.raises(CheckpointError, match="damaged reward model"):
            RewardModel.load(tmp_path / name)
    shutil.copytree(helpful / "checkpoint", tmp_path / "old")
    card = json.loads((tmp_path / "old" / CARD).read_text())
    (tmp_path / "old" / CARD).write_text(json.dumps(card | {"template_hash": "0"}))
    with pytest.raises(CheckpointError, match="another version of template 'chat'"):
        RewardModel.load(tmp_path / "old")
