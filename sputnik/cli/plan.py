"""`sputnik plan MODEL_OR_RECIPE`: parameters, memory, time and money before anything runs.

    sputnik plan v3-671b --hardware 2048xH800 --tokens 14.8T      the published run: 54 days, 2.67M GPU-hours, $5.3M
    sputnik plan recipes/quickstart.toml                          each stage of a recipe

Time = FLOPs / (peak x `--mfu`); memory assumes states split evenly over all devices and one sequence on each. The plan
of a recipe is an upper bound: every answer is as long as it may be. Left out: communication, pipeline stages, failures,
verifiers, text work, stages whose data are made in the run (fine-tuning, reward models), and the experiments that come
before such a run.
"""

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table
from tyro.conf import Positional, arg

from sputnik.cli.console import Console
from sputnik.config import refuse_changed
from sputnik.cost import (
    Precision,
    decode_flops_per_token,
    device_hours,
    forward_flops_per_token,
    kv_bytes_per_token,
    parameters,
    training_flops_per_token,
    training_memory,
    weight_bytes,
)
from sputnik.errors import CheckpointError, ConfigError
from sputnik.eval.suites import SUITES, Suite
from sputnik.hardware import GIB, Hardware, fleet
from sputnik.model.checkpoint import open_weights
from sputnik.model.config import PRESETS, ModelConfig
from sputnik.recipe.checkpoints import find_checkpoint
from sputnik.recipe.corpus import CorpusConfig
from sputnik.recipe.evaluation import EvalConfig
from sputnik.recipe.findings import is_card
from sputnik.recipe.recipe import Recipe, Stage, model_config, read_recipe
from sputnik.recipe.stages import kind_of
from sputnik.recipe.wording import count, duration, money, percent, power
from sputnik.text.gguf_header import gguf_file
from sputnik.text.named_models import EMBEDDED, MODELS
from sputnik.train.adopt import PretrainedConfig
from sputnik.train.pretrain import PretrainConfig
from sputnik.train.rl import RLConfig
from sputnik.train.traces import TracesConfig

GPU_SHARE = 0.39
"""What DeepSeek-V3's own run reached, causal FLOPs against the BF16 peak."""
CPU_SHARE = 0.3
"""What our tiny model reaches on one core."""
DRAWING = 1 / 3
"""Drawing answers reaches about this part of what training reaches: a tenth of the peak on a core, with 256 at once."""
UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@dataclass(frozen=True)
class PlanConfig:
    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A preset (tiny, dense, mini, v2-lite, v3-671b), a run, a checkpoint directory, a config.json, a GGUF file, the
    name of a model (smollm2), or a recipe.toml."""
    hardware: str | None = None
    """NAME or COUNTxNAME, e.g. 8xH800; names: cpu (this machine), H800, H100, H200, A100, B200; default: the recipe's
    own, else cpu."""
    tokens: str | None = None
    """Training tokens of a model, for example 14.8T, 3M or 2e9; without it only sizes and memory are shown."""
    length: int = 4096
    """Tokens in a training sequence of a model, and cached tokens in the decoding figures."""
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
    recipe = config.model.endswith(".toml")
    if config.usd_per_hour is not None and not 0 <= config.usd_per_hour < math.inf:
        raise ConfigError(f"--usd-per-hour {config.usd_per_hour}: a price in dollars, at least 0")
    if recipe:
        if is_card(Path(config.model)):
            raise ConfigError(f"{config.model}: a card with a list of recipes; plan one of those")
        refuse_changed(config, ("tokens", "length", "precision", "recompute"), "is for a model; a recipe says its own")
    plan = plan_recipe(config) if recipe else plan_model(config)
    if config.json:
        print(json.dumps(plan, indent=1))
    else:
        Console().print(recipe_table(plan) if recipe else model_table(plan))


def plan_model(config: PlanConfig) -> dict[str, Any]:
    """All figures of one model as plain values: bytes, seconds, dollars."""
    model = read_shape(config.model)
    device, devices = fleet(config.hardware or "cpu", config.usd_per_hour)
    share = _peak_share(config, device)
    if config.length < 1:
        raise ConfigError(f"length {config.length}: must be at least 1")
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


def _peak_share(config: PlanConfig, device: Hardware) -> float:
    share = config.mfu if config.mfu is not None else CPU_SHARE if device.name == "cpu" else GPU_SHARE
    if not 0 < share <= 1:
        raise ConfigError(f"mfu {share}: a share of the peak lies in 0..1")
    return share


def plan_recipe(config: PlanConfig) -> dict[str, Any]:
    """Work, time and money of every stage at most; stages without multiplications cost nothing here."""
    recipe = read_recipe(Path(config.model), kind_of)
    device, devices = fleet(config.hardware or recipe.hardware, config.usd_per_hour)
    share = _peak_share(config, device)
    corpora = [stage.config for stage in recipe.stages if isinstance(stage.config, CorpusConfig)]
    changes = {"vocab_size": corpora[0].vocab_size} if corpora else {}
    stages: list[dict[str, Any]] = []
    for stage in recipe.stages:
        work = stage_work(stage.config, _shape(recipe, stage, f"{config.model}: [model]", changes))
        hours = device_hours(work.training + work.drawing / DRAWING, device, share)
        row = {"stage": stage.name, "kind": stage.kind, "tokens": work.tokens, "flops": work.training + work.drawing}
        stages.append({**row, "seconds": hours * 3600 / devices, "usd": hours * device.usd_per_hour})
    totals = {key: sum(stage[key] for stage in stages) for key in ("tokens", "flops", "seconds", "usd")}
    hardware = {**asdict(device), "count": devices}
    return {"recipe": recipe.name, "mfu": share, "hardware": hardware, "stages": stages, "total": totals}


@dataclass(frozen=True)
class Work:
    """Tokens trained on or drawn, and FLOPs of training and of drawing."""

    tokens: int = 0
    training: float = 0.0
    drawing: float = 0.0


def _shape(recipe: Recipe, stage: Stage, where: str, changes: dict[str, Any]) -> ModelConfig:
    """Of the model that the stage works with: its own, that of the nearest stage below with one, or the recipe's."""
    for each in (stage, *recipe.ancestors(stage.name)):
        if each.model:
            return model_config(each.model, where, **changes)
        if isinstance(each.config, PretrainedConfig):
            return read_shape(each.config.source)
    return model_config(recipe.model, where, **changes)


def stage_work(stage: Any, model: ModelConfig) -> Work:
    """The most a stage can take, by the class of its config; prompts are short beside answers and left out."""
    if isinstance(stage, PretrainConfig):
        per_token = training_flops_per_token(model, stage.length, mtp=model.num_nextn_predict_layers > 0)
        return Work(stage.tokens, training=stage.tokens * per_token)
    if isinstance(stage, RLConfig):
        trained = stage.steps * stage.prompts_per_step * stage.samples_per_prompt * stage.max_tokens
        evaluations = stage.steps // stage.eval_every + 1
        asked = evaluations * stage.eval_questions * stage.eval_samples * stage.max_tokens
        forward = forward_flops_per_token(model, stage.max_tokens)
        drawing = (trained + asked) * decode_flops_per_token(model, stage.max_tokens // 2)
        return Work(trained + asked, training=trained * 5 * forward, drawing=drawing)  # policy, reference, 3 to train
    if isinstance(stage, EvalConfig):
        usual = SUITES.get(stage.suite, Suite(stage.task, 200, 8, 256))
        most = usual.max_tokens if stage.max_tokens is None else stage.max_tokens
        return _drawn(model, stage.questions or usual.questions, stage.samples or usual.samples, most)
    if isinstance(stage, TracesConfig):
        return Work() if stage.url else _drawn(model, stage.questions, stage.samples, stage.max_tokens)
    return Work()


def _drawn(model: ModelConfig, questions: int, samples: int, most: int) -> Work:
    drawn = questions * samples * most
    return Work(drawn, drawing=drawn * decode_flops_per_token(model, most // 2))


def read_shape(spec: str) -> ModelConfig:
    """A preset by name, else what the config.json or GGUF header at or under a path says."""
    if spec in PRESETS:
        return ModelConfig.preset(spec)
    path = Path(spec)
    if path.suffix != ".json":
        if not (path.exists() or (Path("runs") / spec).exists() or spec in (*MODELS, EMBEDDED)):
            raise ConfigError(f"{spec!r} is neither a preset ({', '.join(PRESETS)}) nor a model directory or run")
        found = find_checkpoint(spec).path
        packed = gguf_file(found)
        if packed is not None:
            return open_weights(packed).config
        path = found / "config.json"
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
    if not 0 < number < math.inf:
        raise ConfigError(f"tokens {text!r}: write a positive number like 14.8T, 300M or 2e9")
    return number


def _lowest(device: Hardware) -> Precision:
    return "fp32" if device.name == "cpu" else "bf16" if device.fp8 is None else "fp8"


def recipe_table(plan: dict[str, Any]) -> Table:
    """One row a stage, and the sum."""
    hardware = plan["hardware"]
    title = f"{plan['recipe']} on {hardware['count']} x {hardware['name']}, at most"
    table = Table(title=title, title_justify="left", show_footer=True)
    total = plan["total"]
    table.add_column("stage", "all", overflow="fold")  # names and figures whole, however narrow the terminal is
    table.add_column("kind", overflow="fold")
    for header, footer in zip(("tokens", "FLOPs", "time", "money"), _figures(total), strict=True):
        table.add_column(header, footer, justify="right", overflow="fold")
    for row in plan["stages"]:
        table.add_row(row["stage"], row["kind"], *(_figures(row) if row["flops"] else []))
    table.caption = (
        f"training at {percent(plan['mfu'])} of peak, drawing at a third of that; "
        f"${hardware['usd_per_hour']:.2f} per device and hour ({hardware['price']})"
    )
    return table


def _figures(row: dict[str, Any]) -> list[str]:
    return [count(row["tokens"]), power(row["flops"]), duration(row["seconds"]), money(row["usd"])]


def model_table(plan: dict[str, Any]) -> Table:
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
