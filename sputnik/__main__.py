"""The command line: `sputnik VERB ...`, one table from verb to its config class and its main function.

Only the module of the verb that is asked for is imported, so `sputnik --help` needs no torch. The flags of a verb are
the fields of its config, and `sputnik VERB --help` begins with the docstring of its module. A `SputnikError` is the
user's to mend, and so is a file that the system refuses us: one line on stderr, exit code 2. Ctrl-C exits 130. A reader
of our output who goes away ends us with 141 and without a word, as a shell expects of programs in a pipe.
"""

import errno
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

from sputnik import __version__
from sputnik.errors import ConfigError, SputnikError
from sputnik.hardware import cache_directory

VERBS = {
    "quickstart": ("sputnik.cli.quickstart:QuickstartConfig", "train a small V3, teach it to reason, write the report"),
    "run": ("sputnik.cli.run:RunConfig", "run the stages of a recipe, each once, resumable"),
    "eval": ("sputnik.cli.eval:EvalModelConfig", "score a model on a task, with error bars"),
    "serve": ("sputnik.cli.serve:ServeConfig", "answer over HTTP as OpenAI and DeepSeek do: API server"),
    "keys": ("sputnik.cli.keys:KeysConfig", "keys of the API server: create, list, revoke"),
    "usage": ("sputnik.cli.usage:UsageConfig", "what each key used, in tokens and money"),
    "chat": ("sputnik.cli.chat:ChatConfig", "talk to a model in the terminal, its thinking shown"),
    "generate": ("sputnik.cli.generate:GenerateConfig", "answer a file of prompts, many at a time, resumable"),
    "rl": ("sputnik.cli.rl:RlVerbConfig", "teach a model to reason by rewards that a program can check"),
    "traces": ("sputnik.cli.traces:TracesVerbConfig", "a model's right and readable answers as examples to train on"),
    "reward-model": ("sputnik.cli.reward_model:JudgeConfig", "train a judge of answers, or let one score a file"),
    "distill": ("sputnik.cli.distill:DistillConfig", "a small model learns what a larger one wrote"),
    "sft": ("sputnik.cli.sft:SftVerbConfig", "teach a model your dialogues, resumable"),
    "convert": ("sputnik.cli.convert:ConvertConfig", "write a model as Hugging Face safetensors or GGUF"),
    "release": ("sputnik.cli.release:ReleaseConfig", "a model of a finished run for others to use, with its card"),
    "report": ("sputnik.cli.report:ReportConfig", "write report.html and report.json of a run"),
    "plan": ("sputnik.cli.plan:PlanConfig", "memory, time and money of a recipe or model before anything runs"),
    "doctor": ("sputnik.cli.doctor:DoctorConfig", "what this machine has, what is missing, how to get it"),
}

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FIXES: Mapping[int, str] = {
    errno.ENOENT: "check the name",
    errno.EISDIR: "name a file, not a directory",
    errno.ENOTDIR: "name a directory, not a file",
    errno.EEXIST: "name another place",
    errno.EACCES: "change who may use it, or name another place",
    errno.EPERM: "change who may use it, or name another place",
    errno.EROFS: "name another place",
    errno.ENOSPC: "make room and run the same command again",
    errno.EDQUOT: "make room and run the same command again",
    errno.EFBIG: "raise the limit of files (ulimit -f) and run the same command again",
}
"""What a user can do about a file that the system refuses; of other errors the system's own words have to do."""


def overview() -> str:
    """The text of `sputnik --help`."""
    lines = [f"  {verb:12} {text}" for verb, (_, text) in VERBS.items()]
    return "\n".join(
        [
            "usage: sputnik VERB ...",
            "",
            "Sputnik: an open, complete DeepSeek. Train a V3 model, teach it to reason with R1's recipe, talk to it.",
            "",
            *lines,
            "",
            "sputnik VERB --help lists the flags of a verb; sputnik --version says which version this is.",
        ]
    )


def run_verb(verb: str, args: Sequence[str]) -> int:
    """Parse the flags of `verb` into its config and call its main; returns the exit code."""
    if verb not in VERBS:
        raise ConfigError(f"no verb {verb!r}; choose one of {', '.join(VERBS)}")
    home, text = VERBS[verb]
    module_name, _, config_name = home.partition(":")
    module = import_module(module_name)
    import tyro

    # examples are indented, so that tyro does not fill them into a paragraph
    description = re.sub("^sputnik ", "    sputnik ", module.__doc__ or text, flags=re.MULTILINE)
    config = tyro.cli(getattr(module, config_name), prog=f"sputnik {verb}", description=description, args=args)
    return module.main(config) or 0


def refusal(error: OSError) -> str:
    """What to tell the user of a file or directory that the system refuses us."""
    named, code, cache = error.filename2 or error.filename, error.errno or 0, cache_directory()
    fix = FIXES.get(code)
    if named and code not in (*FULL, errno.EISDIR):
        path = Path(named)
        if cache in (path, *path.parents) or path in cache.parents:
            fix = "set SPUTNIK_CACHE to a directory you may write"
    return "; ".join(filter(None, (f"{named}: {error.strerror}" if named else error.strerror, fix)))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code is the return value."""
    try:
        try:
            return _answer(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # nobody reads on, as in `sputnik doctor | head`
        _discard_output()
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is None and error.errno not in FULL:  # of a socket, say: nothing that the user named
            raise
        if error.filename is None:  # perhaps the disk that our output goes to
            _discard_output()
        return _fail(refusal(error))


def _answer(args: Sequence[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if args else 2
    if args[0] in ("-V", "--version"):
        print(f"sputnik {__version__}")
        return 0
    try:
        return run_verb(args[0], args[1:])
    except SputnikError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _discard_output() -> None:
    """For the flush at exit, which would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(text: str) -> int:
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
