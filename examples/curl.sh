#!/bin/sh
# The API with nothing but curl. Start the server with `make run` first, or name another: ENGINE_URL=http://host:port,
# and if it wants a key, ENGINE_API_KEY.
set -eu
url=${ENGINE_URL:-http://127.0.0.1:8000}
key=${ENGINE_API_KEY:-none}
key=${key%%,*}

ask() { # ask <path> [<arguments of curl>...]
    path=$1
    shift
    curl -sS "$url$path" -H "Authorization: Bearer $key" "$@"
}

echo "--- what is served"
ask /v1/models

echo; echo "--- a chat"
ask /v1/chat/completions -H 'Content-Type: application/json' -d '{
  "messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 30, "temperature": 0}'

echo; echo "--- another, streamed"
ask /v1/chat/completions -N -H 'Content-Type: application/json' -d '{
  "messages": [{"role": "user", "content": "Count to five."}], "max_tokens": 30, "temperature": 0,
  "stream": true, "stream_options": {"include_usage": true}}'

echo "--- two continuations of a text, with log-probabilities"
ask /v1/completions -H 'Content-Type: application/json' -d '{
  "prompt": "Once upon a time", "max_tokens": 8, "n": 2, "seed": 7, "logprobs": 2}'

echo; echo "--- tokens"
ask /tokenize -H 'Content-Type: application/json' -d '{"prompt": "Hello, world"}'
echo
