#!/usr/bin/env bash
# Make .venv and install the package with the exact versions of constraints.txt: scripts/setup.sh run|dev|bench
#
# torch goes first and by its exact version, so that no later step can bring in a build with gigabytes of GPU libraries.
# The stamp .venv/.ready-* is written last; make calls this script again when pyproject.toml or constraints.txt is newer.
set -euo pipefail
cd "$(dirname "$0")/.."

want=${1:?usage: scripts/setup.sh run|dev|bench}
case "$want" in
  run) target=. ;;
  dev) target=".[dev]" ;;
  bench) target=".[dev,bench]" ;;
  *) echo "setup: unknown set $want; choose run, dev or bench" >&2; exit 2 ;;
esac

say() { echo "setup: $*"; }

# Make a virtual environment, or finish a half-made one; Debian's bare python3 has no ensurepip, which its python3-venv
# package brings.
make_venv() {
  local python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "setup: Python 3.11 or newer is needed; name one with make PYTHON=..." >&2; exit 2; }
  if ! "$python" -c 'import ensurepip' 2>/dev/null; then
    [ "$(id -u)" = 0 ] || { echo "setup: $python cannot make environments: sudo apt-get install python3-venv" >&2; exit 2; }
    say "installing python3-venv"
    apt-get -qq update && apt-get -qq install -y --no-install-recommends python3-venv >/dev/null
  fi
  "$python" -m venv .venv
}

# pip says nothing but what it downloads and what it installs.
pip_install() {
  .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off --constraint constraints.txt "$@" 2>.venv/pip-errors |
    awk '/^ *Downloading.* MB\)|^Installing collected/ { print "  " substr($0, 1, 150); fflush() }' || { cat .venv/pip-errors >&2; exit 1; }
}

start=$(date +%s)
.venv/bin/python -m pip --version >/dev/null 2>&1 || { say "making .venv"; make_venv; }

torch=$(grep '^torch==' constraints.txt)
if ! .venv/bin/python -c 'import sys, torch; sys.exit(torch.__version__.split("+")[0] != sys.argv[1])' "${torch#*==}" 2>/dev/null; then
  say "$torch, CPU build"
  if [ -n "${TORCH_INDEX:-}" ]; then pip_install --index-url "$TORCH_INDEX" "$torch"; else pip_install "$torch"; fi
fi
say "sputnik and what it needs ($want)"
pip_install --editable "$target"
say "$(.venv/bin/python -m sputnik.model.kernels 2>&1 | tail -1)"

touch ".venv/.ready-$want"
case "$want" in dev) touch .venv/.ready-run ;; bench) touch .venv/.ready-run .venv/.ready-dev ;; esac
say "done in $(( $(date +%s) - start )) seconds"
