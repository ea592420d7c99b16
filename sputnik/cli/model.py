"""From what a user types to a model that answers, for the verbs that talk to one."""

from typing import Any, Literal

from sputnik.engine.llm import LLM
from sputnik.errors import ConfigError
from sputnik.recipe.checkpoints import find_checkpoint

Template = Literal["auto", "chat", "zero", "own"]


def load_llm(spec: str, template: Template = "auto", **engine: Any) -> LLM:
    """The model meant by `spec`, spoken to in the template it was taught unless `template` says otherwise."""
    found = find_checkpoint(spec)
    taught: Template = "zero" if found.template == "zero" else "auto"
    return LLM(found.path, taught if template == "auto" else template, **engine)


def require_thinking(llm: LLM, thinking: bool) -> None:
    """A ConfigError where thinking is to be off and the template has no way to say so."""
    if llm.template == "zero" and not thinking:
        raise ConfigError("template zero always thinks: leave thinking on, or use --template chat")
