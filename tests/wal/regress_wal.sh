#!/usr/bin/env bash
# Makes WAL out of PostgreSQL's own regression suite, for the tests that compare our decoder with pg_waldump.
#
#   tests/wal/regress_wal.sh DIR      DIR must not exist; it gets the segments and `controldata`
#
# Then: LAKEBASE_TEST_WAL=DIR cargo test -p wal --test pg_waldump
#
# LAKEBASE_TEST_PG   PostgreSQL 17's bin directory (default: pg_config on PATH)
# LAKEBASE_PG_TESTS  directory of its test suites, with regress/ in it (default: ../tests beside the bin directory)
# LAKEBASE_PG_USER   who runs PostgreSQL when this is run by root (default postgres)
set -euo pipefail
[ $# = 1 ] || { sed -n '2,/^set -e/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
out=$(realpath -m "$1")
bin=${LAKEBASE_TEST_PG:-$(pg_config --bindir)} || { echo "PostgreSQL 17 is missing: set LAKEBASE_TEST_PG" >&2; exit 2; }
suites=${LAKEBASE_PG_TESTS:-$bin/../tests}
regress=$(cd "$suites/regress" 2>/dev/null && pwd) || { echo "no regress/ in $suites: set LAKEBASE_PG_TESTS" >&2; exit 2; }
[ ! -e "$out" ] || { echo "$out exists" >&2; exit 2; }

as=(env)
work=$(mktemp -d)
if [ "$(id -u)" = 0 ]; then
  user=${LAKEBASE_PG_USER:-postgres}
  as=(runuser -u "$user" --)
  chown "$user" "$work"
fi
trap '"${as[@]}" "$bin/pg_ctl" -s -m immediate -D "$work/data" stop 2>/dev/null || true; rm -rf "$work"' EXIT
chmod 755 "$work"
cd "$work"

"${as[@]}" "$bin/initdb" --no-sync --data-checksums --wal-segsize=16 --auth=trust --locale=C --encoding=UTF8 \
  --username=postgres -D "$work/data" >/dev/null
# wal_keep_size keeps every segment; small checkpoints make many page images.
"${as[@]}" tee -a "$work/data/postgresql.conf" >/dev/null <<CONF
listen_addresses = ''
unix_socket_directories = '$work'
fsync = off
autovacuum_naptime = 5s
max_prepared_transactions = 4
max_connections = 60
wal_level = logical
wal_keep_size = 100GB
max_wal_size = 256MB
wal_compression = pglz
track_commit_timestamp = on
CONF
start() { "${as[@]}" "$bin/pg_ctl" -w -s -l "$work/log" -D "$work/data" start >/dev/null; }
psql() { "${as[@]}" "$bin/psql" -X -q -h "$work" -U postgres -v ON_ERROR_STOP=1 -c "$1" postgres; }
run() { # name, tests or --schedule
  mkdir -p "$work/$1/results"; chmod -R 777 "$work/$1"
  # A test that fails leaves WAL like any other, so failures do not matter here; that the suite ran does.
  (umask 0; PGHOST=$work PGUSER=postgres "$regress/pg_regress" --bindir="$bin" --host="$work" --user=postgres \
    --inputdir="$regress" --expecteddir="$regress" --dlpath="$regress" --outputdir="$work/$1" --max-concurrent-tests=20 \
    "${@:2}") >"$work/$1.log" 2>&1 || true
  local passed; passed=$(grep -c '^ok ' "$work/$1.log" || true)
  echo "$1: $passed tests passed"
  [ "$passed" -ge 5 ] || { tail -20 "$work/$1.log" >&2; exit 1; }
}

start
run pglz --schedule="$regress/parallel_schedule"
# Consistency checking adds an image to every block reference, one that redo must not apply; of heap pages there would be
# gigabytes.
psql "alter system set wal_consistency_checking = 'btree,gin,gist,spgist,hash,brin,sequence'"
for method in lz4 zstd off; do
  psql "alter system set wal_compression = '$method'"
  [ "$method" != off ] || psql "alter system reset wal_consistency_checking"
  psql "select pg_reload_conf()" >/dev/null
  psql "select pg_switch_wal()" >/dev/null
  run "$method" test_setup create_misc create_index btree_index hash_index gin gist spgist brin sequence
done
"${as[@]}" "$bin/pg_ctl" -w -s -m immediate -D "$work/data" stop
start
psql "checkpoint"
"${as[@]}" "$bin/pg_ctl" -w -s -m fast -D "$work/data" stop

mkdir -p "$out"
find "$work/data/pg_wal" -maxdepth 1 -name '????????????????????????' -exec mv -t "$out" {} +
"${as[@]}" env LC_ALL=C "$bin/pg_controldata" -D "$work/data" >"$out/controldata"
chmod -R a+rX "$out"
echo "$(find "$out" -name '????????????????????????' | wc -l) segments in $out"
