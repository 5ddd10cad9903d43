# shellcheck shell=bash
# Runs the command that it is given on a Ray cluster of the job's nodes. Sourced by the job scripts, on the job's first node.
set -euo pipefail

# Every client and node needs the token: the file is made once, in the home that the nodes share, for its owner alone.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"
[ -s "$RAY_AUTH_TOKEN_PATH" ] || { echo "no token at $RAY_AUTH_TOKEN_PATH: run 'ray get-auth-token --generate'" >&2; exit 2; }
chmod 600 "$RAY_AUTH_TOKEN_PATH"

# This job's own folder and ports. Sockets want a short path, on a local disk. The dashboard listens on loopback.
export RAY_TMPDIR="/tmp/ray-$SLURM_JOB_ID" RAY_USAGE_STATS_ENABLED=0 RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300
unset RAY_ADDRESS
port=$((20000 + SLURM_JOB_ID % 1000 * 10))
address="$(hostname -I | cut -d' ' -f1):$port"
mkdir -p "$RAY_TMPDIR"
pid_file="$RAY_TMPDIR/driver.pid"
rm -f "$pid_file"

# A signal goes to the driver alone, which saves. Sent to the whole step, it would end Ray's processes as well, and nothing
# would be left to save with.
asked="" signalled=""
ask() {
  asked="$1" signalled=yes
  if [ -s "$pid_file" ]; then kill -TERM "$(cat "$pid_file")" || true; else kill -TERM "$step" || true; fi
}
trap 'ask again' USR1 # the time is nearly over
trap 'ask end' TERM INT

srun --kill-on-bad-exit=0 ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" \
  --object-manager-port $((port + 1)) --node-manager-port $((port + 2)) \
  --dashboard-port $((port + 3)) --dashboard-agent-listen-port $((port + 4)) --metrics-export-port $((port + 5)) \
  -- bash -c 'echo $$ > "$0"; exec "$@"' "$pid_file" "$@" --address "$address" &
step=$!
while :; do
  code=0 signalled=""
  wait "$step" || code=$?
  [ -n "$signalled" ] || break # a signal ends `wait`, not the step
done

# `ray symmetric-run` ends with 0 as well when Ray did not start.
[ -s "$pid_file" ] || { echo "Ray did not start on all nodes" >&2; exit 1; }
if [ "$asked" = again ] && [ "$code" -eq 130 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
