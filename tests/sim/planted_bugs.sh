#!/usr/bin/env bash
# Proves that the simulator finds bugs: builds it with each planted bug, which must break a safety rule within 10,000
# seeds, and without any, which must be clean on the same seeds. Prints "N passed, M failed" at the end.
set -euo pipefail

cd "$(dirname "$0")/../../engine"
export PATH="$PATH:$HOME/.cargo/bin"
binaries=$(mktemp -d)
trap 'rm -rf "$binaries"' EXIT
seeds=10000
passed=0
failed=0
highest=1000

# Rules that each bug may break: a lack of progress does not count as found.
declare -A rules=(
    [ack-before-flush]="lost commit|differ|served|never proposed|after ballot"
    [accept-stale-term]="fenced|lost commit|differ|after ballot"
    [forget-term-on-restart]="won twice|fenced|lost commit|differ|after ballot|two writers"
    [commit-older-term]="lost commit|differ|served|after ballot"
    [forget-promises]="stale read"
    [serve-incomplete-record]="no end of a record"
    [replaced-disk-votes]="lost commit|differ|after ballot"
)

build() { # name of the binary, options of cargo
    cargo build --locked --quiet -p sim "${@:2}"
    cp "${CARGO_TARGET_DIR:-target}/debug/sim" "$binaries/$1"
}

for bug in "${!rules[@]}"; do
    build "$bug" --features "bug-$bug"
    if output=$("$binaries/$bug" --safety --seeds "$seeds" 2>/dev/null); then
        echo "FAILED $bug: not found within $seeds seeds"
        failed=$((failed + 1))
        continue
    fi
    found=$(grep -m 1 '^seed ' <<<"$output")
    if grep -qE "${rules[$bug]}" <<<"$found"; then
        echo "ok $bug: ${found:0:200}"
        passed=$((passed + 1))
        seed=$(sed -E 's/^seed ([0-9]+):.*/\1/' <<<"$found")
        highest=$((seed > highest ? seed : highest))
    else
        echo "FAILED $bug: another rule was broken than expected: $found"
        failed=$((failed + 1))
    fi
done

build clean
if output=$("$binaries/clean" --seeds "$highest" 2>/dev/null); then
    echo "ok clean: $(head -n 1 <<<"$output")"
    passed=$((passed + 1))
else
    echo "FAILED clean: $(head -n 1 <<<"$output")"
    failed=$((failed + 1))
fi
echo "$passed passed, $failed failed"
((failed == 0))
