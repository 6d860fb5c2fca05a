#!/usr/bin/env bash
# Say what a server with clustered heads will gain, then start it: OpenAI-compatible, by vLLM.
#
#   examples/serve.sh MODEL PROFILE [options of vllm serve...]
#   ESTIMATE_ONLY=1 examples/serve.sh MODEL PROFILE
#
# MODEL is a folder or a name on the hub. The estimate loads nothing and needs no GPU.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: $0 MODEL PROFILE [options of vllm serve...]" >&2
    exit 2
fi
model=$1 profile=$2
shift 2

chai serve "$model" --profile "$profile" --estimate "$@"
if [ -z "${ESTIMATE_ONLY:-}" ]; then
    exec chai serve "$model" --profile "$profile" "$@"
fi
