#!/usr/bin/env bash
# bubblewrap, in which task `code` runs programs (docs/sandbox.md): Debian's package, checked by apt; made for 0.8.0.
# Without root its one program is unpacked into .venv/bin. Never fails: without it code tasks refuse, and their tests
# are skipped.
set -uo pipefail
cd "$(dirname "$0")/.."
command -v bwrap >/dev/null || [ -x .venv/bin/bwrap ] && exit 0
missing="sandbox: bubblewrap is missing, code tasks will refuse: sudo apt-get install bubblewrap"
command -v apt-get >/dev/null || { echo "$missing"; exit 0; }

if [ "$(id -u)" = 0 ]; then root=""; elif sudo -n true 2>/dev/null; then root="sudo -n"; else root="none"; fi
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
if [ "$root" != none ]; then
  echo "sandbox: installing bubblewrap"
  { $root apt-get -qq update && $root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends bubblewrap; } \
    >"$work/log" 2>&1
else
  echo "sandbox: unpacking bubblewrap into .venv/bin"
  mkdir -p "$work/lists/partial" "$work/archives/partial" .venv/bin
  own=(-o "Dir::State=$work" -o "Dir::State::status=/var/lib/dpkg/status" -o "Dir::Cache=$work")
  { apt-get -qq "${own[@]}" update && (cd "$work" && apt-get -qq "${own[@]}" download bubblewrap) &&
    dpkg -x "$work"/bubblewrap_*.deb "$work" && install -m 755 "$work/usr/bin/bwrap" .venv/bin/bwrap; } >"$work/log" 2>&1
fi || echo "$missing ($(tail -n 1 "$work/log"))"
exit 0
