#!/usr/bin/env bash
# A real Ray cluster of several raylets on this machine, each on its own loopback address, with token authentication.
#
#   cluster/local.sh start [NODES]   so many raylets (3), the first of them the head; prints what to export
#   cluster/local.sh env             the lines to export again: eval "$(cluster/local.sh env)"
#   cluster/local.sh status          which nodes are alive
#   cluster/local.sh add-node        one raylet more
#   cluster/local.sh kill-node N     SIGKILL to all of node N, as a machine that is gone; 1 is the head
#   cluster/local.sh stop            end this cluster's processes, no others, and remove its folder
#
# CPUS: CPUs that each node offers (1). FOLDER: where the cluster lives, one folder each; keep it short, paths of sockets
# are limited to 107 characters. NET: the addresses' beginning (127.0.0), another for each cluster at the same time.
# DASHBOARD_PORT: of the jobs API (8265). BIN: where `ray` and `python` are; default: .venv/bin here, else the PATH.
# Linux only: elsewhere 127.0.0.2 answers only after it was set up.
set -euo pipefail
umask 077

FOLDER=${FOLDER:-/tmp/dpo-ray-cluster-$(id -u)}
HERE=$(cd "$(dirname "$0")/.." && pwd)
if [ -z "${BIN:-}" ] && [ -x "$HERE/.venv/bin/ray" ]; then BIN=$HERE/.venv/bin; fi
if [ -n "${BIN:-}" ]; then PATH=$(cd "$BIN" && pwd):$PATH; fi

fail() { echo "error: $*" >&2; exit 2; }

# A node is one session of processes, led by `ray start --block`; its file holds the leader's id. An id alone may be
# somebody else's by now: it counts only while it leads a session and names our folder on its command line.
leads() { # ID
  [ "$(ps -o sid= -p "$1" | tr -d ' ')" = "$1" ] && tr '\0' '\n' <"/proc/$1/cmdline" | grep -qF "$FOLDER/ray/"
}

leader() { # N
  local id
  id=$(cat "$FOLDER/node-$1.pid" 2>/dev/null) && leads "$id" 2>/dev/null && echo "$id"
}

numbers() { find "$FOLDER" -maxdepth 1 -name 'node-*.pid' | sed 's/.*node-\([0-9]*\)\.pid/\1/' | sort -n; }

load() { # the settings of the cluster that is there
  [ -f "$FOLDER/settings" ] || fail "no cluster in $FOLDER; cluster/local.sh start"
  [ -O "$FOLDER/settings" ] || fail "$FOLDER is not yours"
  . "$FOLDER/settings"
}

free_ports() { # HOW MANY
  python -c "
import socket
free = [socket.create_server(('', 0)) for _ in range($1)]
print(*(server.getsockname()[1] for server in free))"
}

# Each node has a folder of its own, as on machines of their own: in one, a node that unpacks a job's code takes it from under
# a node that runs it. `--temp-dir` is also the mark by which our own processes are known. The agent listens on 127.0.0.1 besides its node's
# address, where the agent of any other Ray may have the usual port; without its agent a head takes no jobs.
start_node() { # N, then options of `ray start`
  local n=$1
  shift
  RAY_TMPDIR=$FOLDER/ray/$n RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$FOLDER/token RAY_USAGE_STATS_ENABLED=0 \
    setsid ray start --block "$@" --temp-dir "$FOLDER/ray/$n" --node-ip-address "$NET.$((n + 1))" \
    --num-cpus "$CPUS" --object-store-memory 100000000 --dashboard-agent-listen-port "$(free_ports 1)" >"$FOLDER/node-$n.log" 2>&1 </dev/null &
  echo $! >"$FOLDER/node-$n.pid"
}

start_worker() { start_node "$1" --address "$NET.2:$GCS_PORT"; }

known() { # the addresses of the nodes that the head knows to be alive
  python - "http://$NET.2:$DASHBOARD_PORT" "$FOLDER/token" <<'PYTHON' 2>/dev/null || true
import json, sys, urllib.request
token = open(sys.argv[2]).read()
ask = urllib.request.Request(sys.argv[1] + "/api/v0/nodes", headers={"Authorization": f"Bearer {token}"})
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
nodes = json.load(opener.open(ask, timeout=10))["data"]["result"]["result"]
print(*(node["node_ip"] for node in nodes if node["state"] == "ALIVE"), sep="\n")
PYTHON
}

# Ray gives a raylet 30 seconds to appear, which a busy machine can miss: it is then started again, a few times.
wait_for() { # N...
  local began=$SECONDS n there missing=$# again=5
  while [ "$missing" -gt 0 ]; do
    [ $((SECONDS - began)) -lt 180 ] || fail "not every node came within three minutes; their logs: $FOLDER/node-*.log"
    sleep 0.5
    there=$(known) missing=0
    for n in "$@"; do
      if ! leader "$n" >/dev/null; then
        again=$((again - 1))
        if [ "$n" != 1 ] && [ "$again" -gt 0 ] && grep -q 'timed out during startup' "$FOLDER/node-$n.log"; then
          start_worker "$n"
          missing=$((missing + 1))
          sleep 1 # until it leads a session of its own
          continue
        fi
        tail -n 3 "$FOLDER/node-$n.log" >&2
        fail "node $n did not start; its log: $FOLDER/node-$n.log; \`stop\` ends those that did"
      fi
      grep -qxF "$NET.$((n + 1))" <<<"$there" || missing=$((missing + 1))
    done
  done
}

print_env() {
  echo "export RAY_ADDRESS=http://$NET.2:$DASHBOARD_PORT"
  echo "export RAY_AUTH_MODE=token"
  echo "export RAY_AUTH_TOKEN_PATH=$FOLDER/token"
  echo "# ray.init and \`--address\` of commands that join the cluster themselves: $NET.2:$GCS_PORT"
}

start() { # NODES
  local n ports
  case $1 in '' | *[!0-9]* | 0) fail "how many nodes? start 3" ;; esac
  [ ! -e "$FOLDER/settings" ] || fail "a cluster is in $FOLDER already; cluster/local.sh stop, or another FOLDER"
  mkdir -p "$FOLDER"
  [ -O "$FOLDER" ] || fail "$FOLDER is not yours; give another FOLDER"
  chmod 700 "$FOLDER"
  NET=${NET:-127.0.0} CPUS=${CPUS:-1} DASHBOARD_PORT=${DASHBOARD_PORT:-8265}
  python - "$NET.2" "$DASHBOARD_PORT" <<'PYTHON' || exit 2
import socket, sys
try:
    socket.create_server((sys.argv[1], int(sys.argv[2]))).close()
except OSError as error:
    sys.exit(f"error: {sys.argv[1]}:{sys.argv[2]}: {error.strerror}; give another NET or DASHBOARD_PORT")
PYTHON
  ports=$(free_ports 2)
  GCS_PORT=${ports% *}
  od -An -tx1 -N32 /dev/urandom | tr -d ' \n' >"$FOLDER/token"
  printf '%s=%s\n' NET "$NET" CPUS "$CPUS" DASHBOARD_PORT "$DASHBOARD_PORT" GCS_PORT "$GCS_PORT" >"$FOLDER/settings"
  start_node 1 --head --port "$GCS_PORT" --dashboard-host "$NET.2" --dashboard-port "$DASHBOARD_PORT" \
    --ray-client-server-port "${ports#* }"
  for n in $(seq 2 "$1"); do start_worker "$n"; done
  wait_for $(seq "$1")
  print_env
}

add_node() {
  local n=$(($(numbers | tail -n 1) + 1))
  start_worker "$n"
  wait_for "$n"
  echo "node $n: $NET.$((n + 1))"
}

kill_node() { # N
  local id
  id=$(leader "$1") || fail "no node $1 is alive; cluster/local.sh status"
  ps -o pid= -s "$id" | xargs kill -KILL
  echo "node $1 ($NET.$(($1 + 1))) killed"
}

status() {
  local n
  for n in $(numbers); do
    echo "node $n ($NET.$((n + 1))): $(leader "$n" >/dev/null && echo alive || echo gone)"
  done
}

# What has the first signal may still be writing; what has not ended after ten seconds is killed.
stop() {
  local n id ids='' began=$SECONDS
  for n in $(numbers); do ids="$ids $(leader "$n" || true)"; done
  for id in $ids; do kill -TERM "$id" 2>/dev/null || true; done
  for id in $ids; do
    while [ -n "$(ps -o pid= -s "$id")" ] && [ $((SECONDS - began)) -lt 10 ]; do sleep 0.2; done
    ps -o pid= -s "$id" | xargs -r kill -KILL 2>/dev/null || true
  done
  rm -rf "$FOLDER"
}

command=${1:-}
[ "$command" = start ] || [ -z "$command" ] || load
case $command in
  start) start "${2:-3}" ;;
  env) print_env ;;
  status) status ;;
  add-node) add_node ;;
  kill-node) kill_node "${2:?which node? kill-node 2}" ;;
  stop) stop ;;
  *) sed -n '2,/^set/{/^#/p}' "$0" | cut -c3- >&2; exit 2 ;;
esac
