"""`sputnik plan MODEL`: parameters, memory, time and money before anything runs.

    sputnik plan v3-671b --hardware 2048xH800 --tokens 14.8T      the published run: 54 days, 2.67M GPU-hours, $5.3M
    sputnik plan runs/quickstart --hardware 8xH100 --tokens 2B --json

Time = FLOPs / (peak x `--mfu`); memory assumes states split evenly over all devices and one sequence on each. Left out:
communication, pipeline stages, failures, and the experiments that come before such a run.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from sputnik.cost import (
    Precision,
    decode_flops_per_token,
    device_hours,
    kv_bytes_per_token,
    parameters,
    training_flops_per_token,
    training_memory,
    weight_bytes,
)
from sputnik.errors import CheckpointError, ConfigError
from sputnik.hardware import GIB, Hardware, fleet
from sputnik.model.config import PRESETS, ModelConfig
from sputnik.recipe.checkpoints import find_checkpoint
from sputnik.recipe.wording import count, duration, money, percent

GPU_SHARE = 0.39
"""What DeepSeek-V3's own run reached, causal FLOPs against the BF16 peak."""
CPU_SHARE = 0.3
"""What our tiny model reaches on one core."""
UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@dataclass(frozen=True)
class PlanConfig:
    model: Positional[str]
    """A preset (tiny, mini, v2-lite, v3-671b), a run, a checkpoint directory, or the config.json of any such model."""
    hardware: str = "cpu"
    """NAME or COUNTxNAME, for example 8xH800; names: cpu (this machine), H800, H100, H200, A100, B200."""
    tokens: str | None = None
    """Training tokens, for example 14.8T, 3M or 2e9; without it only sizes and memory are shown."""
    length: int = 4096
    """Tokens in a training sequence, and cached tokens in the decoding figures."""
    mfu: float | None = None
    """Share of the BF16 peak that training reaches; default 0.39 on GPUs (V3's own run) and 0.3 on a CPU."""
    precision: Precision | None = None
    """Training recipe: fp32, bf16 or fp8; default: the lowest the hardware multiplies."""
    recompute: bool = False
    """Keep only each block's input for the backward pass."""
    usd_per_hour: float | None = None
    """Price of one device."""
    json: bool = False
    """Print the plan as JSON."""


def main(config: PlanConfig) -> None:
    plan = make_plan(config)
    if config.json:
        print(json.dumps(plan, indent=1))
    else:
        Console().print(plan_table(plan))


def make_plan(config: PlanConfig) -> dict[str, Any]:
    """All figures of the plan as plain values: bytes, seconds, dollars."""
    model = read_shape(config.model)
    device, devices = fleet(config.hardware, config.usd_per_hour)
    share = config.mfu if config.mfu is not None else CPU_SHARE if device.name == "cpu" else GPU_SHARE
    if not 0 < share <= 1 or config.length < 1:
        raise ConfigError(f"need 0 < mfu <= 1 and length >= 1; got {share} and {config.length}")
    precision: Precision = config.precision or _lowest(device)
    memory, leaner = (
        training_memory(model, config.length, precision, devices=devices, recompute=choice)
        for choice in (config.recompute, True)
    )
    plan = {
        "model": config.model,
        "length": config.length,
        "parameters": asdict(parameters(model)),
        "hardware": {**asdict(device), "count": devices},
        "training_memory": {
            "precision": precision,
            **asdict(memory),
            "total": memory.total,
            "fits": memory.total <= device.memory,
            "total_with_recompute": leaner.total,
        },
        "serving": {
            "weights": {kind: weight_bytes(model, kind) for kind in ("fp32", "bf16", "fp8")},
            "kv_bytes_per_token": kv_bytes_per_token(model),
            "decode_flops_per_token": decode_flops_per_token(model, config.length),
        },
    }
    if config.tokens is not None:
        plan["training"] = _training(model, device, devices, share, config)
    return plan


def _training(model: ModelConfig, device: Hardware, devices: int, share: float, config: PlanConfig) -> dict[str, Any]:
    tokens = parse_count(config.tokens or "")
    per_token = training_flops_per_token(model, config.length)
    hours = device_hours(tokens * per_token, device, share)
    return {
        "tokens": tokens,
        "flops_per_token": per_token,
        "mfu": share,
        "tokens_per_s": devices * device.bf16 * share / per_token,
        "seconds": hours * 3600 / devices,
        "device_hours": hours,
        "usd": hours * device.usd_per_hour,
    }


def read_shape(spec: str) -> ModelConfig:
    """A preset by name, else the config.json at or under a path."""
    if spec in PRESETS:
        return ModelConfig.preset(spec)
    path = Path(spec)
    if path.suffix != ".json":
        if not path.exists() and not (Path("runs") / spec).exists():
            raise ConfigError(f"{spec!r} is neither a preset ({', '.join(PRESETS)}) nor a model directory or run")
        path = find_checkpoint(spec).path / "config.json"
    try:
        return ModelConfig.from_hf(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as a model's config.json: {error}") from None


def parse_count(text: str) -> float:
    """ "14.8T" -> 14.8e12; K, M, B and T, or a plain number."""
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)([KMBT]?)", text.strip(), re.IGNORECASE)
    try:
        number = float(match[1]) * UNITS[match[2].upper()] if match else 0.0
    except ValueError:
        number = 0.0
    if number <= 0:
        raise ConfigError(f"tokens {text!r}: write a positive number like 14.8T, 300M or 2e9")
    return number


def _lowest(device: Hardware) -> Precision:
    return "fp32" if device.name == "cpu" else "bf16" if device.fp8 is None else "fp8"


def plan_table(plan: dict[str, Any]) -> Table:
    """The plan for people, in four blocks."""
    hardware, memory, sizes = plan["hardware"], plan["training_memory"], plan["parameters"]
    serving, training = plan["serving"], plan.get("training")
    title = f"{plan['model']} on {hardware['count']} x {hardware['name']}"
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_row("parameters", f"{count(sizes['total'])}, {count(sizes['active'])} active per token")
    if sizes["mtp"]:
        table.add_row("  MTP modules", count(sizes["mtp"]))
    table.add_row("attention, one layer", count(sizes["attention"]))
    if sizes["expert"]:
        table.add_row("one expert", count(sizes["expert"]))
    table.add_section()
    table.add_row(f"training memory, {memory['precision']}", f"on each device, of {_gib(hardware['memory'])}")
    for part in ("weights", "gradients", "optimizer", "activations"):
        table.add_row(f"  {part}", _gib(memory[part]))
    table.add_row("  total", _gib(memory["total"]))
    if not memory["fits"]:
        leaner = f"with --recompute {_gib(memory['total_with_recompute'])}"
        table.add_row("", f"[bold red]does not fit[/]; {leaner}; or more devices")
    table.add_section()
    table.add_row("weights to serve", ", ".join(f"{kind} {_gib(size)}" for kind, size in serving["weights"].items()))
    table.add_row("cache per token", f"{serving['kv_bytes_per_token']:,} bytes")
    decoding = f"{serving['decode_flops_per_token'] / 1e9:.3g} GFLOPs at {plan['length']} tokens"
    table.add_row("decoding one token", decoding)
    if training:
        table.add_section()
        table.add_row("training tokens", count(training["tokens"]))
        table.add_row("FLOPs per token", f"{training['flops_per_token'] / 1e9:.4g} G at length {plan['length']}")
        table.add_row("speed", f"{count(training['tokens_per_s'])} tokens/s at {percent(training['mfu'])} of peak")
        table.add_row("time", duration(training["seconds"]))
        table.add_row("device hours", count(training["device_hours"]))
        table.add_row("money", f"{money(training['usd'])} at ${hardware['usd_per_hour']:.2f} per device and hour")
    table.caption = f"price: {hardware['price']}"
    return table


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= 0.1 * GIB else f"{size / 1024**2:,.1f} MiB"
