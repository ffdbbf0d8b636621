#!/usr/bin/env bash
# The object store's tests once more with a real S3 server (scripts/s3-server), which the rust suite does without. Skipped by
# name where there is neither Go to build one nor LAKEBASE_TEST_S3_URL that names another.
set -euo pipefail
top=$(cd "$(dirname "$0")/.." && pwd)
if [ -z "${LAKEBASE_TEST_S3_URL:-}" ]; then
  if ! command -v go >/dev/null && [ ! -x "$(echo "$top"/build/tools/versitygw-*/versitygw)" ]; then
    echo "object-store: S3 skipped: no Go to build versitygw, and LAKEBASE_TEST_S3_URL is not set"
    exit 0
  fi
  dir=$(mktemp -d)
  trap '"$top/scripts/s3-server" stop "$dir"; rm -rf "$dir"' EXIT
  export LAKEBASE_S3_PORT=${LAKEBASE_S3_PORT:-9913}
  environment=$("$top/scripts/s3-server" start "$dir")
  eval "$environment"
fi
cd "$top/engine"
cargo test --locked -p remote-storage
