"""Count the lines of each part of the package against its ceiling: `make lines`, and the last step of `make check`.

A ceiling is raised only in a commit that says why. Blank lines and comments count: they are read too. The kernels' C++
is counted on a line of its own.
"""

import sys
from pathlib import Path

KERNELS = 2750
CEILINGS = {
    "(top)": 1050,
    "cli": 3200,
    "engine": 4400,
    "eval": 2400,
    "model": 4200,
    "recipe": 4600,
    "serve": 10_400,
    "tasks": 4200,
    "text": 2500,
    "train": 5600,
}
TOTAL = 42_000


def count(package: Path) -> dict[str, dict[str, int]]:
    """Folder -> file -> lines, for every Python file of the package."""
    folders: dict[str, dict[str, int]] = {}
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        folder = relative.parts[0] if len(relative.parts) > 1 else "(top)"
        folders.setdefault(folder, {})[relative.as_posix()] = len(path.read_text(encoding="utf-8").splitlines())
    return folders


def main() -> int:
    """Print one line per folder with its longest file; return 1 if a ceiling is passed."""
    package = Path(__file__).parent.parent / "sputnik"
    folders, passed = count(package), list[str]()
    for folder, files in folders.items():
        lines, ceiling = sum(files.values()), CEILINGS.get(folder, 0)
        longest = max(files, key=lambda name: files[name])
        print(f"{folder:10} {lines:6} of {ceiling:6} lines, {len(files):3} files, longest {longest} {files[longest]}")
        if lines > ceiling:
            passed.append(folder)
    native = sum(
        len(p.read_text(encoding="utf-8").splitlines()) for p in package.rglob("*") if p.suffix in (".cpp", ".h")
    )
    print(f"{'C++':10} {native:6} of {KERNELS:6} lines")
    if native > KERNELS:
        passed.append("C++")
    total = sum(sum(files.values()) for files in folders.values())
    print(f"{'total':10} {total:6} of {TOTAL:6} lines")
    if total > TOTAL:
        passed.append("total")
    for folder in passed:
        print(f"lines: {folder} is over its ceiling; make it smaller, or raise CEILINGS and say why", file=sys.stderr)
    return 1 if passed else 0


if __name__ == "__main__":
    sys.exit(main())
