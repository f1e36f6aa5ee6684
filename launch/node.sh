#!/usr/bin/env bash
# One node's part of a run on several: bash launch/node.sh --config configs/X.yaml [--run_dir ... and other settings]
# The same on each node, with NODES, NODE_RANK (0 to NODES - 1), HEAD (name or address of node 0), PORT (free there)
# and PROCESSES_PER_NODE (GPUs of each node) in the environment. slurm/train.sbatch, kubernetes/train.yaml and
# skypilot.yaml set these out of their own and start this.
# SIGUSR1 and SIGTERM: the step under way is finished, a checkpoint written; the same command goes on from there.
# Exit status: 0 finished, another if not; which it was, RUN_DIR/status.json says: launchers hide their workers' codes.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${NODES:?}" "${NODE_RANK:?}" "${HEAD:?}" "${PORT:?}" "${PROCESSES_PER_NODE:?}"

# Threads of each process on the host; its loader's workers are processes of their own (data.workers).
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
# Seconds that workers get to finish their step and write a checkpoint before they are killed; 30 if it is not set.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}"

# NCCL finds its way on most clusters. Where it does not, set in the job's environment:
#   NCCL_SOCKET_IFNAME=eth0   the interface for its first contact (and all traffic without InfiniBand); a node with
#                             several, or a docker bridge, may otherwise be asked on one that nobody else reaches.
#   NCCL_IB_HCA=mlx5          the InfiniBand or RoCE adapters to use, by prefix; NCCL_IB_DISABLE=1 for none.
#   NCCL_DEBUG=INFO           says which of them it took. WARN, as here, says what went wrong.
#   FI_PROVIDER=efa           on AWS, with its plugin, instead of sockets (20 times slower).
# A lost process or link ends the step with an error after distributed.timeout_minutes of the run's config, not NCCL's.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# A worker, host or link that is lost ends the launchers of all hosts, at the latest after distributed.timeout_minutes;
# each starts again by itself, and waits for the others at HEAD:PORT. A host that comes back runs this script again. The
# launcher's own --max_restarts will not do: each host would count its attempts alone, and of different ones they never
# meet. MAX_RESTARTS is for one start of this script; what started it (slurm/train.sbatch, the JobSet) goes beyond.
restarts="${MAX_RESTARTS:-5}"
# Seconds that the other hosts get to notice as well. Who comes too early meets a launcher that is about to end, and
# loses one restart by it.
pause="${RESTART_PAUSE:-10}"

asked=""
child=""
# SIGUSR1 would end the launcher and leave its workers; SIGTERM it passes on, waits, and starts nothing again.
trap 'asked=yes; kill -TERM "$child" 2>/dev/null || true' USR1 TERM INT
run() {
  "$@" &
  child=$!
  if [ -n "$asked" ]; then # the signal came before there was a child to pass it on to
    kill -TERM "$child" 2>/dev/null || true
  fi
  while true; do
    wait "$child" && status=0 || status=$?
    kill -0 "$child" 2>/dev/null || break # else it was a signal that ended the waiting
  done
}

while true; do
  run accelerate launch --config_file launch/accelerate/ddp_nodes.yaml \
    --num_machines "$NODES" --num_processes "$((NODES * PROCESSES_PER_NODE))" --machine_rank "$NODE_RANK" \
    --main_process_ip "$HEAD" --main_process_port "$PORT" \
    ldm/train.py "$@"
  ended="$status"
  if [ "$ended" = 0 ] || [ -n "$asked" ] || [ "$restarts" -le 0 ]; then
    exit "$ended"
  fi
  restarts=$((restarts - 1))
  echo "node $NODE_RANK: the launcher ended with $ended; starting again in $pause s ($restarts more after that)" >&2
  run sleep "$pause"
  if [ -n "$asked" ]; then
    exit "$ended"
  fi
done
