#!/usr/bin/env bash
# From a bare machine to a streamed answer: installs, builds the demo model, serves it, asks it, stops.
#   scripts/demo.sh [QUESTION]
# HTTP_PORT, GRPC_PORT, METRICS_PORT: the server's ports; by default free ones.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

question=${1:-What is the capital of France?}
model=demo/SmolLM2-135M-Instruct
repository=demo/repository
serve_log=demo/serve.log
server=""
times=()

stage() {
  local name=$1 start
  shift
  start=$(date +%s%N)
  printf '\n== %s\n' "$name"
  "$@"
  times+=("$name" "$((($(date +%s%N) - start) / 100000000))")
}

start_server() {
  : >"$serve_log" # the server is ready when this run's log says so, not the last one's
  .venv/bin/trtforge serve "$repository" --log-file demo/tritonserver.log --http-port "${HTTP_PORT:-0}" \
    --grpc-port "${GRPC_PORT:-0}" --metrics-port "${METRICS_PORT:-0}" >"$serve_log" 2>&1 &
  server=$!
  until grep -q '^Ready' "$serve_log"; do
    if ! kill -0 "$server" 2>/dev/null; then
      cat "$serve_log" >&2
      exit 1
    fi
    sleep 0.1
  done
  cat "$serve_log"
}

ask() {
  printf '%s\n\n' "$question"
  .venv/bin/trtforge ask "$question" --url "$(awk '$1 == "gRPC" { print $2 }' "$serve_log")" --stats
}

stop_server() {
  [[ -n $server ]] || return 0
  kill -TERM "$server" 2>/dev/null || true
  wait "$server"
  server=""
}

trap stop_server EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

stage "install" ensure_environment
stage "fetch the demo model" .venv/bin/python -m trtforge.builder.demo_model "$model"
stage "build-engine" .venv/bin/build-engine "$model" --output "$repository" --force
stage "start the server" start_server
stage "ask" ask
stage "stop the server" stop_server

printf '\n%-22s %8s\n' "stage" "seconds"
for ((i = 0; i < ${#times[@]}; i += 2)); do
  printf '%-22s %6d.%d\n' "${times[i]}" "$((times[i + 1] / 10))" "$((times[i + 1] % 10))"
done
