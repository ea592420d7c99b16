import json
import os
import resource
import shutil
import signal
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from sputnik.errors import CheckpointError, DataError
from sputnik.train.state import (
    JsonLines,
    StateStore,
    StopSignal,
    derive_seed,
    load_module_tensors,
    module_tensors,
    read_jsonl,
    stage_lock,
    write_json,
)


def tensors(value: float) -> dict[str, dict[str, Tensor]]:
    return {"model": {"a": torch.full((3, 5), value)}, "optimizer": {"a|step": torch.tensor(value)}, "empty": {}}


def steps_on_disk(store: StateStore) -> list[str]:
    return sorted(path.name for path in store.directory.iterdir())


def test_a_save_comes_back_to_the_bit(tmp_path: Path) -> None:
    store = StateStore(tmp_path / "resume")
    odd = {"bf16": torch.randn(7).bfloat16(), "turned": torch.randn(4, 6).T, "nan": torch.tensor([float("nan"), -0.0])}
    store.save(3, {"model": odd}, {"lr": 0.1 + 0.2, "note": "ü", "position": 2**60})
    saved = store.latest()
    assert saved is not None and saved.step == 3
    assert saved.meta == {"lr": 0.1 + 0.2, "note": "ü", "position": 2**60}
    loaded = store.load(saved, "model")
    assert loaded.keys() == odd.keys()
    assert all(loaded[key].contiguous().view(torch.uint8).equal(odd[key].contiguous().view(torch.uint8)) for key in odd)


def test_loaded_tensors_outlive_the_save_and_are_aligned(tmp_path: Path) -> None:
    store = StateStore(tmp_path / "resume")
    store.save(1, {"model": {"odd": torch.arange(3.0), "next": torch.arange(64.0)}}, {})
    saved = store.latest()
    assert saved is not None
    loaded = store.load(saved, "model")
    shutil.rmtree(saved.path)
    assert loaded["next"].equal(torch.arange(64.0))
    assert all(value.data_ptr() % 64 == 0 for value in loaded.values())


@pytest.mark.parametrize("every", [1, 3, 10])
def test_a_save_from_before_the_last_steps_is_always_there(tmp_path: Path, every: int) -> None:
    store = StateStore(tmp_path / "resume", keep=2, behind=5)
    for step in range(0, 40, every):
        store.save(step, {"model": {"w": torch.zeros(1)}}, {})
        left = sorted(int(path.name[-8:]) for path in store.directory.glob("step-*"))
        assert left[-2:] == [step - every, step][-len(left) :] and len(left) <= 4
        assert left[0] == 0 if step < 5 else any(step - 10 - every < other <= step - 5 for other in left)


def test_saves_after_a_step_can_be_dropped(tmp_path: Path) -> None:
    store = StateStore(tmp_path / "resume", keep=9)
    for step in (0, 4, 8, 12):
        store.save(step, {"model": {"w": torch.full((1,), float(step))}}, {})
    found = store.latest(at_most=7)
    assert found is not None and found.step == 4
    store.drop_after(4)
    newest, oldest = store.latest(), store.oldest()
    assert newest is not None and oldest is not None and (oldest.step, newest.step) == (0, 4)


def test_older_saves_are_pruned_only_after_the_new_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = StateStore(tmp_path / "resume", keep=2)
    order: list[str] = []
    rename, rmtree = Path.rename, shutil.rmtree

    def renaming(path: Path, target: Path) -> Path:
        order.append(f"{path.name} -> {target.name}")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", renaming)
    monkeypatch.setattr(
        shutil, "rmtree", lambda path, **more: (order.append(f"rm {path.name}"), rmtree(path, **more))[1]
    )
    for step in (1, 2, 3):
        order.clear()
        store.save(step, tensors(step), {})
    assert steps_on_disk(store) == ["step-00000002", "step-00000003"]
    publish = order.index(".step-00000003.partial -> step-00000003")
    assert publish < order.index("step-00000001 -> .step-00000001.removed")


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "no state", "torn state"])
def test_a_damaged_save_is_skipped_with_a_warning(tmp_path: Path, damage: str) -> None:
    store = StateStore(tmp_path / "resume")
    store.save(1, tensors(1.0), {})
    newest = store.save(2, tensors(2.0), {})
    file = newest / "model.safetensors"
    match damage:
        case "cut":
            os.truncate(file, file.stat().st_size - 1)
        case "flipped":
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)
        case "missing":
            file.unlink()
        case "no state":
            (newest / "state.json").unlink()
        case "torn state":
            (newest / "state.json").write_text('{"step": 2, "fil')
    with pytest.warns(UserWarning, match="step-00000002 is damaged"):
        saved = store.latest()
    assert saved is not None and saved.step == 1
    assert store.load(saved, "model")["a"].equal(torch.full((3, 5), 1.0))
    store.save(2, tensors(3.0), {})  # the repeated step takes the place of the damaged save
    again = store.latest()
    assert again is not None and store.load(again, "model")["a"].equal(torch.full((3, 5), 3.0))


def test_an_intact_save_of_the_same_step_is_left_alone(tmp_path: Path) -> None:
    store = StateStore(tmp_path / "resume")
    store.save(1, tensors(1.0), {"n": 1})
    before = (tmp_path / "resume/step-00000001/state.json").stat().st_ino
    store.save(1, tensors(1.0), {"n": 2})
    assert (tmp_path / "resume/step-00000001/state.json").stat().st_ino == before


def test_leftovers_of_a_killed_save_are_ignored_and_swept(tmp_path: Path) -> None:
    store = StateStore(tmp_path / "resume")
    store.save(1, tensors(1.0), {})
    for name in (".step-00000002.partial", ".step-00000000.removed"):
        (store.directory / name).mkdir()
        (store.directory / name / "model.safetensors").write_bytes(b"half")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved = store.latest()
    assert saved is not None and saved.step == 1
    store.save(2, tensors(2.0), {})
    assert steps_on_disk(store) == ["step-00000001", "step-00000002"]


def test_an_empty_directory_has_no_save(tmp_path: Path) -> None:
    assert StateStore(tmp_path / "nothing").latest() is None


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    """A limit on file size stands for the full disk: the write itself fails in the middle of the second file."""
    store = StateStore(tmp_path / "resume")
    store.save(1, {"model": {"a": torch.ones(1000)}}, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(DataError, match="disk full while saving step 2 .*: the save of step 1 is intact;") as error:
            store.save(2, {"model": {"a": torch.ones(1000)}, "optimizer": {"m": torch.ones(5000)}}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert steps_on_disk(store) == ["step-00000001"]
    saved = store.latest()
    assert saved is not None and store.load(saved, "model")["a"].equal(torch.ones(1000))


def test_space_is_checked_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = StateStore(tmp_path / "resume")
    store.save(1, tensors(1.0), {})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    with pytest.raises(
        DataError, match=r"disk full while saving step 2 .* MB needed, 0 MB free; the save of step 1 is"
    ):
        store.save(2, tensors(2.0), {})
    assert steps_on_disk(store) == ["step-00000001"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("bias", torch.zeros(4))
        self.register_buffer("table", torch.zeros(4), persistent=False)


def test_a_tied_weight_is_saved_once_and_stays_tied(tmp_path: Path) -> None:
    model, other = Tied(), Tied()
    assert module_tensors(model).keys() == {"embedding.weight", "bias"}
    pointer = other.embedding.weight.data_ptr()
    load_module_tensors(other, {key: value.clone() for key, value in module_tensors(model).items()})
    assert other.head.weight.equal(model.embedding.weight) and other.head.weight is other.embedding.weight
    assert other.embedding.weight.data_ptr() == pointer
    with pytest.raises(CheckpointError, match="'bias'"):
        load_module_tensors(other, {"embedding.weight": model.embedding.weight})


def test_a_log_is_cut_at_the_saved_position(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "metrics.jsonl", 0)
    log.write({"step": 1, "loss": 2.5})
    position = log.position
    log.write({"step": 2, "loss": float("nan")})
    log.close()
    assert read_jsonl(log.path) == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": None}]
    again = JsonLines(log.path, position)
    again.write({"step": 2, "loss": 1.0})
    again.close()
    assert read_jsonl(log.path) == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.0}]
    with pytest.raises(DataError, match="shorter than the saved state knows"):
        JsonLines(log.path, 10_000)


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"a": 1}\n{"a": 2')
    assert read_jsonl(path) == [{"a": 1}]
    log = JsonLines(path)
    log.write({"a": 3})
    log.close()
    assert read_jsonl(path) == [{"a": 1}, {"a": 3}]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b'{"a": 1}\n\0\0\0\n{"a": 3}\n')
    with pytest.raises(DataError, match=r"ledger.jsonl:2: damaged .*: mend or delete this line"):
        read_jsonl(path)


def test_written_json_is_strict(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": [float("inf"), 1.5], "b": {"c": float("nan")}})
    assert json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail) == {
        "a": [None, 1.5],
        "b": {"c": None},
    }


def test_seeds_are_pure_and_streams_differ() -> None:
    assert derive_seed(0, "rollout", 7) == 3821302095180156861
    seeds = {derive_seed(seed, stream, step) for seed in range(3) for stream in ("a", "b") for step in range(50)}
    assert len(seeds) == 300
    assert derive_seed(1, "2") != derive_seed(12) != derive_seed("1", 2)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_second_process_is_refused_and_the_lock_dies_with_its_owner(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    owner = os.fork()
    if owner == 0:
        with stage_lock(tmp_path):
            os.write(writer, b"held")
            time.sleep(60)
        os._exit(0)
    assert os.read(reader, 4) == b"held"
    with pytest.raises(DataError, match="another process is running this stage"), stage_lock(tmp_path):
        pass
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    with stage_lock(tmp_path):
        pass


def test_the_first_signal_asks_and_the_second_aborts(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        assert "stopping after this step" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before
