#!/bin/sh
# The API with nothing but curl. Start the server with `make run` first, or name another: ENGINE_URL=http://host:port
set -eu
url=${ENGINE_URL:-http://127.0.0.1:8000}

echo "--- what is served"
curl -sS "$url/v1/models"

echo; echo "--- a chat"
curl -sS "$url/v1/chat/completions" -H 'Content-Type: application/json' -d '{
  "messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 30, "temperature": 0}'

echo; echo "--- another, streamed"
curl -sSN "$url/v1/chat/completions" -H 'Content-Type: application/json' -d '{
  "messages": [{"role": "user", "content": "Count to five."}], "max_tokens": 30, "temperature": 0,
  "stream": true, "stream_options": {"include_usage": true}}'

echo "--- two continuations of a text, with log-probabilities"
curl -sS "$url/v1/completions" -H 'Content-Type: application/json' -d '{
  "prompt": "Once upon a time", "max_tokens": 8, "n": 2, "seed": 7, "logprobs": 2}'

echo; echo "--- tokens"
curl -sS "$url/tokenize" -H 'Content-Type: application/json' -d '{"prompt": "Hello, world"}'
echo
