#!/bin/sh
# Builds the exhaustive check with each planted bug and expects it to be found. Prints the histories with -v.
# Run from anywhere; needs cargo. Ends with "N passed, M failed", and 1 if a bug was
# not found.
set -eu
cd "$(dirname "$0")"
passed=0
failed=0
for bug in $(sed -n 's/^\(bug-[a-z-]*\) = .*/\1/p' Cargo.toml); do
    if output=$(cargo test --quiet --package consensus --features "$bug" --test exhaustive -- --nocapture 2>&1); then
        echo "$output" | sed -n "s/^.*found that/$bug: found that/p"
        if echo "$output" | grep -q 'found that'; then passed=$((passed + 1)); else echo "$bug: no check looked for it"; failed=$((failed + 1)); fi
        [ "${1:-}" != -v ] || echo "$output"
    else
        echo "$bug: NOT FOUND"
        echo "$output"
        failed=$((failed + 1))
    fi
done
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
