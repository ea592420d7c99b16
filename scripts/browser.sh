#!/usr/bin/env bash
# Debian's Chromium for the test that opens the report in a browser. Never fails: without it that one test is skipped.
set -uo pipefail
command -v chromium >/dev/null && exit 0

if [ "$(id -u)" = 0 ]; then root=""; elif sudo -n true 2>/dev/null; then root="sudo -n"; else
  echo "browser: Chromium is missing, the browser test will be skipped: sudo apt-get install chromium"
  exit 0
fi
command -v apt-get >/dev/null || { echo "browser: Chromium is missing, the browser test will be skipped"; exit 0; }
echo "browser: installing Chromium for the report's browser test"
log=$(mktemp); trap 'rm -f "$log"' EXIT
if ! { $root apt-get -qq update && $root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium; } \
  >"$log" 2>&1; then
  echo "browser: could not install Chromium, the browser test will be skipped: $(tail -n 1 "$log")"
fi
exit 0
