#!/usr/bin/env bash
# Load tests of served models with NVIDIA's unmodified tools and with trtforge bench, beside each other.
#   scripts/load_test.sh REPOSITORY_OR_URL...
# A repository is served for the test; a URL is the gRPC HOST:PORT of a running server. Results and reports
# are in .cache/load-tests; the tools are fetched into .cache/load-tools.
#
# CONCURRENCY ("1 4"), REQUESTS (40) of each run, INPUT_LEN (64), OUTPUT_LEN (32), MODEL (llm)
# TOOLS        which of "perf_analyzer genai-perf aiperf bench"; all by default
# TRTFORGE     the command to use instead of the one in .venv, which then is not made
# For URLs only: TOKENIZER, a folder, without which genai-perf and aiperf are left out; HTTP_URL, without
# which aiperf is; METRICS_URL; VOCAB_SIZE (256)
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() { sed -n '2,12s/^# \{0,1\}//p' "scripts/load_test.sh"; }
[[ $# -gt 0 ]] || { usage >&2; exit 2; }
[[ $1 != -h && $1 != --help ]] || { usage; exit 0; }
read -ra concurrencies <<<"${CONCURRENCY:-1 4}"
read -ra chosen <<<"${TOOLS:-perf_analyzer genai-perf aiperf bench}"
read -ra trtforge <<<"${TRTFORGE:-.venv/bin/trtforge}"
requests=${REQUESTS:-40} input_len=${INPUT_LEN:-64} output_len=${OUTPUT_LEN:-32} model=${MODEL:-llm}
tools=$PWD/.cache/load-tools
limit_s=300 # of each run of each tool
server=""

# --------------------------------------------------------------------------- the tools

wanted() { [[ " ${chosen[*]} " == *" $1 "* ]]; }

# Makes an environment with one requirement, unless it is there.
install_tool() {
  local name=$1 requirement=$2
  [[ ! -f $tools/$name/installed-$requirement ]] || return 0
  echo "Installing $requirement; it brings much with it, and takes some minutes."
  rm -rf "${tools:?}/$name"
  "$(find_python)" -m venv "$tools/$name"
  "$tools/$name/bin/pip" install -qq --disable-pip-version-check "$requirement"
  touch "$tools/$name/installed-$requirement"
}

# The wheel asks for glibc 2.38: pip is told so, and an older system gets that of the next Debian suite.
install_perf_analyzer() {
  local wheel=perf-analyzer==2.60.0 folder=$tools/perf_analyzer binary loader=() root
  [[ ! -x $tools/bin/perf_analyzer ]] || return 0
  echo "Fetching $wheel"
  rm -rf "$folder"
  "$(find_python)" -m pip install -qq --disable-pip-version-check --no-deps --only-binary=:all: \
    --platform manylinux_2_38_x86_64 --target "$folder" "$wheel"
  binary=$folder/perf_analyzer/bin/perf_analyzer
  chmod +x "$binary"
  if ! "$binary" --version >/dev/null 2>&1; then
    fetch_glibc
    root=$tools/glibc/root/usr/lib/x86_64-linux-gnu
    loader=("$root/ld-linux-x86-64.so.2" --library-path "$root" --argv0 perf_analyzer)
  fi
  mkdir -p "$tools/bin"
  {
    printf '#!/usr/bin/env bash\nexec'
    printf ' %q' "${loader[@]}" "$binary" # the checkout's path may have spaces
    printf ' "$@"\n'
  } >"$tools/bin/perf_analyzer.new"
  chmod +x "$tools/bin/perf_analyzer.new"
  "$tools/bin/perf_analyzer.new" --version
  mv "$tools/bin/perf_analyzer.new" "$tools/bin/perf_analyzer"
}

# Unpacks, and does not install, libc6, libstdc++6 and libgcc-s1 of Debian 13.
fetch_glibc() {
  local folder=$tools/glibc mirror package options
  # shellcheck disable=SC2016 # apt-get fills it in
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 2>/dev/null | head -1)
  if [[ -z $mirror ]]; then
    echo "error: perf_analyzer needs glibc 2.38, and no Debian mirror is set up to fetch it from" >&2
    return 1
  fi
  rm -rf "$folder"
  mkdir -p "$folder"/{lists,archives}/partial "$folder/root"
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main" >"$folder/sources.list"
  options=(-qq -o "Dir::Etc::sourcelist=$folder/sources.list" -o Dir::Etc::sourceparts=-
    -o "Dir::State::lists=$folder/lists" -o "Dir::Cache=$folder" -o APT::Sandbox::User=root)
  apt-get "${options[@]}" update
  (cd "$folder" && apt-get "${options[@]}" download libc6 libstdc++6 libgcc-s1)
  for package in "$folder"/*.deb; do
    dpkg-deb -x "$package" "$folder/root"
  done
  rm -rf "$folder"/{lists,archives} "$folder"/*.bin
}

# --------------------------------------------------------------------------- the server

start_server() {
  local repository=$1 log=$2
  : >"$log"
  "${trtforge[@]}" serve "$repository" --http-port 0 --grpc-port 0 --metrics-port 0 >"$log" 2>&1 &
  server=$!
  until grep -q '^Ready' "$log"; do
    kill -0 "$server" 2>/dev/null || { cat "$log" >&2; exit 1; }
    sleep 0.1
  done
}

stop_server() {
  [[ -n $server ]] || return 0
  kill -TERM "$server" 2>/dev/null || true
  wait "$server" || true
  server=""
}

# --------------------------------------------------------------------------- the runs

# Runs a tool; what it prints goes to a log, of which the end is shown if it fails.
logged() {
  local log=$1
  shift
  echo "  $(basename "$log" .log)"
  timeout "$limit_s" "$@" >"$log" 2>&1 </dev/null || {
    echo "error: it ended with status $?; the end of $log:" >&2
    tail -n 15 "$log" >&2
  }
}

run_tools() {
  local concurrency=$1 folder=$2 backend lengths
  lengths=(--synthetic-input-tokens-mean "$input_len" --synthetic-input-tokens-stddev 0
    --output-tokens-mean "$output_len" --output-tokens-stddev 0)
  mkdir -p "$folder"
  echo "concurrency $concurrency"
  if wanted perf_analyzer; then
    logged "$folder/perf_analyzer.log" "$tools/bin/perf_analyzer" -m "$model" --streaming -i grpc -u "$grpc_url" \
      --input-data "$results/input.json" --concurrency-range "$concurrency" --request-count "$requests" \
      --profile-export-file "$folder/perf_analyzer.json"
  fi
  if wanted genai-perf && [[ -n $tokenizer ]]; then
    for backend in tensorrtllm vllm; do
      logged "$folder/genai-perf-$backend.log" env PATH="$tools/bin:$PATH" HF_HUB_OFFLINE=1 \
        "$tools/genai-perf/bin/genai-perf" profile -m "$model" --endpoint-type kserve --backend "$backend" \
        --streaming -u "$grpc_url" --tokenizer "$tokenizer" --concurrency "$concurrency" \
        --request-count "$requests" "${lengths[@]}" --artifact-dir "$folder/genai-perf-$backend"
    done
  fi
  if wanted aiperf && [[ -n $tokenizer && -n $http_url ]]; then
    # Not HF_HUB_OFFLINE, with which this version takes no folder for a tokenizer.
    logged "$folder/aiperf.log" "$tools/aiperf/bin/aiperf" profile -m "$model" --url "$http_url" --streaming \
      --endpoint-type template --endpoint "/v2/models/$model/generate_stream" \
      --extra-inputs "payload_template:$PWD/scripts/aiperf_request.json" --extra-inputs response_field:text_output \
      --tokenizer "$tokenizer" --concurrency "$concurrency" --request-count "$requests" "${lengths[@]}" \
      --artifact-dir "$folder/aiperf" --ui none --no-server-metrics
  fi
  if wanted bench; then
    logged "$folder/bench.log" "${trtforge[@]}" bench --url "$grpc_url" --model "$model" \
      --concurrency "$concurrency" --num-requests "$requests" --input-len "$input_len" \
      --output-len "$output_len" --vocab-size "$vocab_size" --json "$folder/bench.json" \
      --html "$folder/bench.html" ${metrics_url:+--metrics-url "$metrics_url"}
  fi
}

load_test() {
  local target=$1 concurrency
  results=$PWD/.cache/load-tests/$(basename "${target//:/-}")
  rm -rf "$results"
  mkdir -p "$results"
  if [[ -d $target ]]; then
    vocab_size=$(python3 scripts/load_tools.py vocab-size "$target" "$model")
    tokenizer=$(realpath "$target/$model/1/tokenizer")
    start_server "$target" "$results/serve.log"
    grpc_url=$(awk '$1 == "gRPC" { print $2 }' "$results/serve.log")
    http_url=$(awk '$1 == "HTTP" { print $2 }' "$results/serve.log")
    metrics_url=$(awk '$1 == "metrics" { print $2 }' "$results/serve.log")
  else
    grpc_url=$target vocab_size=${VOCAB_SIZE:-256} tokenizer=${TOKENIZER:-}
    http_url=${HTTP_URL:-} metrics_url=${METRICS_URL:-}
  fi
  printf '\n== %s: %d requests, %d tokens in, %d out\n' "$target" "$requests" "$input_len" "$output_len"
  python3 scripts/load_tools.py input "$results/input.json" --vocab-size "$vocab_size" \
    --input-len "$input_len" --output-len "$output_len" --requests "$requests"
  for concurrency in "${concurrencies[@]}"; do
    run_tools "$concurrency" "$results/$concurrency"
  done
  stop_server
  python3 scripts/load_tools.py table "$results" | tee "$results/table.md"
}

trap stop_server EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

[[ -n ${TRTFORGE:-} ]] || ensure_environment
mkdir -p "$tools"
if wanted perf_analyzer || wanted genai-perf; then install_perf_analyzer; fi
if wanted genai-perf; then install_tool genai-perf genai-perf==0.0.16; fi
if wanted aiperf; then install_tool aiperf aiperf==0.13.0; fi
for target in "$@"; do
  load_test "$target"
done
