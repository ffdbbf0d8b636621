#!/usr/bin/env bash
# Redo, metadata and shard state against servers of earlier minor releases and their recoveries, whose WAL differs. Run from the top with build/env.sh sourced.
#
# A mirror keeps earlier releases in its pool for as long as it likes: one that has none is skipped by name.
set -euo pipefail
for version in 17.10 17.11; do
  if ! bin=$(scripts/postgresql-minor "$version"); then
    echo "minors: $version skipped: the mirror does not have its packages any more"
    continue
  fi
  echo "minors: $version"
  (
    cd engine
    export LAKEBASE_TEST_PG=$bin
    cargo test --locked -p redo --test consistency --test record_types
    cargo test --locked -p metadata --test files_of_a_server
    # Two positions each; `make soak` does many, on the newest release.
    LAKEBASE_RECOVERIES=2 cargo test --locked -p shard --test recoveries
  )
done
