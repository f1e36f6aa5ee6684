#!/usr/bin/env bash
# Runs the test suite in .venv, which it makes if needed: bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/environment.sh demo,test
# Two workers of one thread each: most tests are single small processes; those that launch several set their own number.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec .venv/bin/python -m pytest --numprocesses "${LDM_TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
