#!/usr/bin/env bash
# PostgreSQL, on which the tests of keys and usage run a server of their own: Debian's package, without the server that
# it would start. Never fails: without it those tests run on SQLite alone, and say so.
set -uo pipefail
command -v initdb >/dev/null && exit 0
ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 && exit 0
missing="postgres: PostgreSQL is missing, its tests will be skipped: sudo apt-get install postgresql"
command -v apt-get >/dev/null || { echo "$missing"; exit 0; }

if [ "$(id -u)" = 0 ]; then root=""; elif sudo -n true 2>/dev/null; then root="sudo -n"; else echo "$missing"; exit 0; fi
echo "postgres: installing PostgreSQL for its tests"
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
install() { $root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$@"; }
{ $root apt-get -qq update && install postgresql-common &&
  $root sed -i "s/^#\?create_main_cluster.*/create_main_cluster = false/" /etc/postgresql-common/createcluster.conf &&
  install postgresql; } >"$work/log" 2>&1 || echo "$missing ($(tail -n 1 "$work/log"))"
exit 0
