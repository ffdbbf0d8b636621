"""PostgreSQL's log, which the agent writes: nobody rotates it from outside, so it has a bound of its own."""

from lakebase_testing.cluster import LocalCluster
from lakebase_testing.waiting import wait_for

# engine/crates/compute/src/postgres_log.rs; a read of 64 KiB may come on top.
_BYTES_MAX = (64 << 20) + (64 << 10)


def test_the_log_of_a_talkative_postgresql_is_bounded() -> None:
    """Once, the file grew until the disk was full, which was the end of PGDATA, too."""
    with LocalCluster(members=1) as cluster:
        writer = cluster.start_writer({"log_min_messages": "log"})
        older = writer.postgres_log.with_name("postgres.log.1")
        with writer.connect() as connection:
            connection.execute("set client_min_messages = error")
            connection.execute("do $$ begin for i in 1..1000 loop raise log '%', repeat('x', 150000); end loop; end $$")
            connection.execute("do $$ begin raise log 'the last line'; end $$")

            wait_for("the last line", lambda: "the last line" in writer.postgres_log.read_text()[-10_000:])
            assert older.exists(), "the log never grew to its bound"
            # A line of 150 kB is written whole.
            assert older.stat().st_size <= _BYTES_MAX + 150_000
            assert writer.postgres_log.stat().st_size <= _BYTES_MAX
            assert sorted(path.name for path in writer.data.glob("postgres.log*")) == ["postgres.log", "postgres.log.1"]
