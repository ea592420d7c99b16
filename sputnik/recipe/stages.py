"""The kinds of stages a recipe can name, each with its config class and its function: one table, read on demand.

    corpus      texts and worked examples -> tokenizer and shards            sputnik/recipe/corpus.py
    pretrain    corpus -> base model                                         sputnik/train/pretrain.py
    pretrained  a named model -> the same with our dialogue tokens           sputnik/train/adopt.py
    rl          model -> model that reasons (R1-Zero, R1's RL stages)        sputnik/train/rl.py
    sft         model, examples -> model that has learned them               sputnik/train/sft.py
    traces      model or teacher -> right, readable answers as examples      sputnik/train/traces.py
    eval        model -> scores                                              sputnik/recipe/evaluation.py
    general     texts -> open prompts, examples, pairs, safety labels        sputnik/recipe/general.py
    reward-model  model, pairs or labels -> judge of answers                 sputnik/train/reward_model.py
    speed       model -> how well its MTP modules guess, and what that gains sputnik/recipe/measures.py
    readability evaluation -> how many of its thoughts a person can read     sputnik/recipe/measures.py

Stage functions in `train/` know nothing of recipes; the functions here hand them the directories.
"""

from dataclasses import replace
from typing import Any

from rich.progress import Progress

from sputnik.cost import Meter
from sputnik.errors import ConfigError
from sputnik.hardware import fleet
from sputnik.recipe.corpus import CorpusConfig, build_corpus
from sputnik.recipe.evaluation import EvalConfig, run_evaluation
from sputnik.recipe.general import GeneralConfig, build_general
from sputnik.recipe.judges import run_reward_model
from sputnik.recipe.measures import ReadabilityConfig, SpeedConfig, run_readability, run_speed
from sputnik.recipe.recipe import Kind, model_config
from sputnik.recipe.runner import StageContext
from sputnik.text.preferences import CARD
from sputnik.text.tokenizer import Tokenizer
from sputnik.train import adopt, pretrain, reward_model, rl, sft, traces


def run_pretraining(config: pretrain.PretrainConfig, context: StageContext) -> dict[str, Any]:
    """A base model from the corpus among its ancestors, whose tokenizer gives vocabulary and special tokens; if another
    base model is among them too, that one trained on."""
    corpus = context.ancestors.get("corpus")
    if corpus is None:
        raise ConfigError("a pretrain stage needs a corpus stage among its ancestors; write parent = NAME")
    tok = Tokenizer.load(corpus / "tokenizer")
    shape = model_config(
        context.model,
        "[model]",
        vocab_size=tok.vocab_size,
        bos_token_id=tok.bos_id,
        eos_token_id=tok.eos_id,
        pad_token_id=tok.pad_id,
    )
    meter = Meter(*fleet(context.recipe.hardware))
    before = context.ancestors.get("pretrain")
    return pretrain.pretrain(
        config, shape, tok, corpus / "train", corpus / "held_out", context.directory, meter, context.console,
        start=None if before is None else before / "checkpoint",
    )  # fmt: skip


def run_pretrained(config: adopt.PretrainedConfig, context: StageContext) -> dict[str, Any]:
    """A model of other makers that can be spoken to in our templates."""
    with Progress(console=context.console, transient=True) as progress:
        bar = progress.add_task("    dialogue tokens", total=config.steps)
        return adopt.adopt_checkpoint(config, context.directory, lambda step, _: progress.update(bar, completed=step))


def run_rl(config: rl.RLConfig, context: StageContext) -> dict[str, Any]:
    """RL on the parent's checkpoint; of its inputs, reward models judge the open prompts that the others bring."""
    if context.parent is None:
        raise ConfigError("an rl stage needs a parent with a checkpoint; write parent = NAME")
    judges = [path / "checkpoint" for path in context.inputs.values() if (path / "checkpoint" / CARD).is_file()]
    prompts = [path / "prompts.jsonl" for path in context.inputs.values() if (path / "prompts.jsonl").is_file()]
    if len(judges) + len(prompts) < len(context.inputs):
        raise ConfigError("inputs of an rl stage are reward models, or have open prompts (prompts.jsonl)")
    meter = Meter(*fleet(context.recipe.hardware))
    checkpoint = context.parent / "checkpoint"
    return rl.train_rl(config, checkpoint, context.directory, meter, context.console, judges=judges, prompts=prompts)


def run_sft(config: sft.SFTConfig, context: StageContext) -> dict[str, Any]:
    """Fine-tune the parent's checkpoint on the examples of the stages it reads and of the files it names."""
    if context.parent is None:
        raise ConfigError("an sft stage needs a parent with a checkpoint; write parent = NAME")
    files = {name: directory / "data.jsonl" for name, directory in context.inputs.items()}
    config = replace(config, repeats={str(files.get(name, name)): times for name, times in config.repeats.items()})
    meter, checkpoint = Meter(*fleet(context.recipe.hardware)), context.parent / "checkpoint"
    return sft.train_sft(config, checkpoint, [*files.values()], context.directory, meter, context.console)


def run_traces(config: traces.TracesConfig, context: StageContext) -> dict[str, Any]:
    """Sample the parent's checkpoint, or the teacher behind `url`, and keep what is worth learning."""
    if context.parent is None and not config.url:
        raise ConfigError(
            "a traces stage needs a parent with a checkpoint, or the url of a teacher; write parent = NAME"
        )
    checkpoint = None if config.url or context.parent is None else context.parent / "checkpoint"
    meter = Meter(*fleet(context.recipe.hardware))
    return traces.collect_traces(config, checkpoint, context.directory, meter, context.console)


KINDS = {
    "corpus": Kind(
        CorpusConfig,
        build_corpus,
        stands_alone=True,
        headline=("tokens", "vocab_size", "held_out_tokens"),
        makes=("tokenizer", "train", "held_out"),
    ),
    "pretrain": Kind(
        pretrain.PretrainConfig,
        run_pretraining,
        resumable=True,
        needs_model=True,
        outcome_free=frozenset(pretrain.OUTCOME_FREE),
        headline=("tokens", "loss", "bits_per_byte", "tokens_per_s"),
        makes=("checkpoint",),
    ),
    "pretrained": Kind(
        adopt.PretrainedConfig,
        run_pretrained,
        stands_alone=True,
        headline=("parameters", "rows", "loss_before", "loss"),
        makes=("checkpoint",),
    ),
    "rl": Kind(
        rl.RLConfig,
        run_rl,
        resumable=True,
        outcome_free=frozenset(rl.OUTCOME_FREE),
        headline=("reward", "accuracy_reward", "length", "tokens_per_s"),
        makes=("checkpoint",),
    ),
    "general": Kind(
        GeneralConfig,
        build_general,
        stands_alone=True,
        headline=("data", "pairs", "labels", "prompts"),
        makes=("data.jsonl", "pairs.jsonl", "labels.jsonl", "prompts.jsonl", "held_out"),
    ),
    "reward-model": Kind(
        reward_model.RewardModelConfig,
        run_reward_model,
        resumable=True,
        outcome_free=frozenset(reward_model.OUTCOME_FREE),
        headline=("accuracy", "length_baseline", "majority"),
        makes=("checkpoint", "scores.json"),
    ),
    "sft": Kind(
        sft.SFTConfig,
        run_sft,
        resumable=True,
        added={"repeats": {}},
        outcome_free=frozenset(sft.OUTCOME_FREE),
        headline=("examples", "loss", "val_loss", "bits_per_byte"),
        makes=("checkpoint",),
    ),
    "traces": Kind(
        traces.TracesConfig,
        run_traces,
        resumable=True,
        added={"reworded": 0.0},
        gone={"near": 0.9},
        headline=("kept", "samples", "length", "checks"),
        makes=("data.jsonl",),
    ),
    "eval": Kind(
        EvalConfig,
        run_evaluation,
        resumable=True,
        outcome_free=frozenset({"workers"}),
        headline=("pass@1", "cons@k", "truncated"),
        makes=("eval.json",),
    ),
    "speed": Kind(SpeedConfig, run_speed, headline=("acceptance", "speed_up"), makes=("speed.json",)),
    "readability": Kind(
        ReadabilityConfig, run_readability, headline=("readable", "language"), makes=("readability.json",)
    ),
}


def kind_of(name: str) -> Kind:
    """The kind called `name`."""
    if name not in KINDS:
        raise ConfigError(f"no stage kind {name!r}; choose one of {', '.join(KINDS)}")
    return KINDS[name]
