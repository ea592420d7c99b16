#!/bin/sh
# `sputnik serve` with its arguments, as process 1, so that SIGTERM drains it. Secrets may come in files: NAME_FILE names
# the file that holds NAME, so that neither `docker inspect` nor a manifest shows them.
set -eu
for name in SPUTNIK_API_KEY SPUTNIK_PEPPER PGPASSWORD; do
  eval "file=\${${name}_FILE:-}"
  if [ -n "$file" ]; then
    value=$(cat "$file")
    export "$name=$value"
    unset "${name}_FILE"
  fi
done
python -m sputnik.model.kernels >&2 || echo "entrypoint: without compiled kernels, see above" >&2
exec sputnik serve "$@"
