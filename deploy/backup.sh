#!/usr/bin/env bash
# The database of keys and usage: a copy of it while the server runs, and the way back. SQLite needs the program
# sqlite3, PostgreSQL its client programs.
#
#   deploy/backup.sh keep DATABASE FILE       FILE is there whole or not at all, for its owner alone; never over another
#   deploy/backup.sh restore DATABASE FILE    with the server stopped; SQLite's file that was there is set aside
#
# DATABASE as `sputnik serve --database` has it: a path, sqlite:///PATH or postgresql+psycopg://USER@HOST/NAME, its
# password in PGPASSWORD or ~/.pgpass. A PostgreSQL database that is restored must exist: `createdb NAME`.
set -euo pipefail
umask 077

fail() { echo "backup: $*" >&2; exit 1; }
usage() { sed -n '/^#   deploy/s/^#   //p' "$0" >&2; exit 2; }

[ $# = 3 ] || usage
database=${2/#postgresql+psycopg:/postgresql:}; database=${database#sqlite:///}; file=$3
new=$file.new

whole() { [ "$(sqlite3 -readonly "$1" "PRAGMA integrity_check" 2>&1)" = ok ]; }

keep_sqlite() {
  [ -f "$database" ] || fail "there is no $database"
  sqlite3 -cmd ".timeout 10000" "$database" "VACUUM INTO '${new//\'/\'\'}'"
  whole "$new" || fail "the copy is not whole: look at the disk"
}

keep_postgresql() { pg_dump --format=custom --no-owner --dbname="$database" --file="$new"; }

restore_sqlite() {
  whole "$file" || fail "$file is no whole database"
  if [ -e "$database" ]; then
    # the journal can be given up only by who is alone with the file
    case $(sqlite3 "$database" "PRAGMA journal_mode=DELETE" 2>&1) in
      delete) ;;
      *locked*) fail "$database is in use: stop the server first" ;;
      *) echo "backup: what is there is damaged" >&2 ;;
    esac
    aside=$database.before-$(date -u +%Y%m%dT%H%M%SZ)
    for each in "" -wal -shm; do [ ! -e "$database$each" ] || mv -n "$database$each" "$aside$each"; done
    echo "backup: what was there is $aside"
  fi
  cp "$file" "$database.new" && mv "$database.new" "$database"
}

restore_postgresql() {
  others="SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
  for last in no no no yes; do
    [ "$(psql --no-psqlrc -At --dbname="$database" -c "$others")" != 0 ] || break
    [ $last = no ] || fail "it is in use: stop the server first"
    sleep 0.5
  done
  pg_restore --clean --if-exists --no-owner --single-transaction --exit-on-error --dbname="$database" "$file"
}

case $database in *://*) kind=postgresql ;; *) kind=sqlite ;; esac
case $1 in
  keep)
    [ ! -e "$file" ] || fail "$file is there already"
    trap 'rm -f "$new"' EXIT
    rm -f "$new"
    "keep_$kind"
    mv -n "$new" "$file"
    echo "backup: $file" ;;
  restore)
    [ -f "$file" ] || fail "there is no $file"
    "restore_$kind"
    echo "backup: keys, budgets and usage are as they were when $file was made, $(date -u -r "$file" +%FT%TZ)"
    echo "backup: a key revoked since then is valid again, one created since is gone: look at 'sputnik keys list', and"
    echo "backup: revoke before the server starts. What was asked since is in nobody's bill." ;;
  *) usage ;;
esac
