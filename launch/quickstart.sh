#!/usr/bin/env bash
# From a fresh clone to pictures that follow a prompt: environment, shards, latents, training, samples.
# Run again, each stage finds what is done. Extra arguments go to training: bash launch/quickstart.sh --training.steps 3000
set -euo pipefail
cd "$(dirname "$0")/.."
config=configs/demo.yaml
run=runs/quickstart
times=()

stage() { # stage NAME COMMAND...: runs it and remembers its time
  local name="$1" start=$SECONDS
  shift
  echo "== $name"
  "$@"
  times+=("$(printf '%-12s %4d s' "$name" $((SECONDS - start)))")
}

stage environment bash launch/environment.sh demo
export PATH="$PWD/.venv/bin:$PATH" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
launch=(accelerate launch --num_processes 1 --num_machines 1 --dynamo_backend no --mixed_precision no)
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  launch+=(--cpu)
fi

demo_data() { # appears under its name only when it is complete
  if [ -f data/demo/train/manifest.json ] && [ -f data/demo/validation/manifest.json ]; then
    echo "data/demo is there"
  else
    python tools/make_demo_data.py --out data/demo --shards --validation 16
  fi
}
stage shards demo_data
stage latents "${launch[@]}" tools/encode_latents.py --config "$config" --run_dir "$run"
stage training "${launch[@]}" ldm/train.py --config "$config" --run_dir "$run" "$@"
stage samples python ldm/sample.py --checkpoint "$run" --prompts configs/demo_prompts.txt \
  --steps 20 --guidance 4 --grid --out "$run/samples.png"
stage retrieval python ldm/evaluate.py --checkpoint "$run" --shards data/demo/train --captions 64 \
  --steps 20 --guidance 4 --out "$run/retrieval"

echo
echo "done: $run/samples.png"
printf '  %s\n' "${times[@]}"
