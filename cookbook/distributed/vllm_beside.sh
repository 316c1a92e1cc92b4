#!/usr/bin/env bash
# One node: GPUs 0-5 train, 6-7 serve. cookbook/distributed/vllm_beside.sh MODEL RUN.yaml [a.b=c ...]
# The run names the sampler: rollout.sampler: {vllm_server: {url: "http://127.0.0.1:8000", dtype: bfloat16}}
set -euo pipefail
model=$1 run=$2
train=${TRAIN:-0,1,2,3,4,5} serve=${SERVE:-6,7} port=${PORT:-8000}
count() { tr , '\n' <<< "$1" | wc -l; }

CUDA_VISIBLE_DEVICES=$serve python -m prefopt.rollout.serve "$model" --port "$port" \
    --tensor-parallel-size "$(count "$serve")" > "${LOG:-server.log}" 2>&1 &
server=$!
trap 'kill "$server" 2> /dev/null && wait "$server" || true' EXIT
until curl -sf "http://127.0.0.1:$port/health" > /dev/null; do
    kill -0 "$server" 2> /dev/null || { echo "the server ended: see ${LOG:-server.log}" >&2; exit 1; }
    sleep 1
done
CUDA_VISIBLE_DEVICES=$train torchrun --nproc_per_node "$(count "$train")" -m prefopt train "$run" "${@:3}"
