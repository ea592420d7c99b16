"""kill -9 for real: fine-tuning in a process of its own, killed in its tracks, must end as if unbroken."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sputnik.model.checkpoint import load_model, save_model
from sputnik.model.transformer import Transformer
from sputnik.train.sft import SFTConfig, train_sft
from sputnik.train.state import read_jsonl

Base = Any  # conftest.Base: this directory is no package to import it from
SETTINGS: dict[str, Any] = {"epochs": 4, "batch": 8, "micro_tokens": 128, "precision": "fp32", "held_out": 0.1}
TIMES = {"tokens_per_s", "flops_per_s", "peak_share", "seconds", "usd"}

PROGRAM = """
import json, sys
from pathlib import Path
import torch
from sputnik.cost import Meter
from sputnik.hardware import Hardware
from sputnik.train.sft import SFTConfig, train_sft
torch.set_num_threads(1)
parent, data, out = map(Path, sys.argv[1:4])
meter = Meter(Hardware("test", 1e11, None, 1e10, 1e10, 0.1, "test"))
train_sft(SFTConfig(**json.loads(sys.argv[4]), save_seconds=1e-3), parent, [data], out, meter)
"""


@pytest.fixture
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def metrics(out: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_jsonl(out / "metrics.jsonl")]


@pytest.mark.usefixtures("one_thread")
def test_killed_and_started_again_ends_in_the_same_bits(base: Base, tmp_path: Path) -> None:
    parent, data, broken, whole = (tmp_path / name for name in ("parent", "sums.jsonl", "broken", "whole"))
    model = Transformer(base.model_config).init_weights(torch.Generator().manual_seed(0))
    save_model(model, parent, tokenizer=base.tok)
    data.write_text("".join(json.dumps({"prompt": f"{n}", "answer": f"{n + 1}"}) + "\n" for n in range(64)))
    command = [sys.executable, "-c", PROGRAM, str(parent), str(data), str(broken), json.dumps(SETTINGS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as process:
        while not (broken / "metrics.jsonl").exists() or len(read_jsonl(broken / "metrics.jsonl")) < 4:
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    done = len(read_jsonl(broken / "metrics.jsonl"))
    for out in (broken, whole):
        train_sft(SFTConfig(**SETTINGS), parent, [data], out, base.meter())
    assert 4 <= done < len(metrics(whole)) == 1 + 4 * 8
    assert metrics(broken) == metrics(whole)
    ours, theirs = (load_model(path / "checkpoint").state_dict() for path in (broken, whole))
    assert all(value.equal(theirs[name]) for name, value in ours.items())
