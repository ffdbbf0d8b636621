"""A writer that was replaced while its agent stood still wakes up: it must neither answer nor read its successor's pages."""

import threading
import time

import psycopg
import pytest

from lakebase_testing.cluster import LocalCluster, Writer
from lakebase_testing.page_service import PageServiceSettings
from lakebase_testing.postgres import amcheck, number, value
from lakebase_testing.waiting import hold, wait_for


class Reader:
    """Reads the highest number again and again, each page from its page server; keeps when it got which answer."""

    def __init__(self, writer: Writer) -> None:
        self._dsn = writer.dsn()
        self._ended = threading.Event()
        self.answers: list[tuple[float, int]] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                with psycopg.connect(self._dsn, autocommit=True) as connection:
                    connection.execute("set enable_indexscan = off")
                    while not self._ended.is_set():
                        found = number(connection, "select max(i) from t")
                        self.answers.append((time.monotonic(), found))
            except psycopg.OperationalError:
                self._ended.wait(0.05)

    def end(self) -> None:
        """Ends it."""
        self._ended.set()
        self._thread.join(30)


@pytest.mark.parametrize("restart_page_servers", [False, True])
def test_a_replaced_writer_that_wakes_up_reads_and_answers_nothing(restart_page_servers: bool) -> None:
    """Its PostgreSQL runs on while the agent is stopped; page servers that have just started know no term by themselves."""
    settings = PageServiceSettings(shards=2, stripe_blocks=16, evict="always", fill_timeout="5s")
    with LocalCluster(page_service=settings) as cluster:
        cluster.expect_log("WARN", "ERROR")
        old = cluster.start_writer({"shared_buffers": "128kB"})
        with old.connect() as connection:
            connection.execute("create table t as select i, repeat('x', 500) note from generate_series(1, 5000) i")
            connection.execute("alter system set work_mem = '11111kB'")
        reader = Reader(old)
        wait_for("three answers", lambda: len(reader.answers) >= 3, 60)
        old.process.freeze()
        try:
            new = cluster.start_writer({"shared_buffers": "128kB"}, timeout_seconds=120)
            with new.connect() as connection:
                connection.execute("alter system set work_mem = '22222kB'")
                connection.execute("insert into t select i, 'new' from generate_series(100001, 100100) i")
            replaced_at = time.monotonic()
            wait_for(
                "the page service to keep the new settings",
                lambda: "the page service keeps a file that changed" in new.process.log_text(),
                20,
            )
            if restart_page_servers:
                for page_server in cluster.page_servers:
                    page_server.freeze()
                    page_server.kill()
                    cluster.restart_page_server(page_server, disk=True)
        finally:
            old.process.thaw()
        hold(5)
        reader.end()
        assert all(found == 5000 for _, found in reader.answers)
        assert [at for at, _ in reader.answers if at > replaced_at] == []
        with new.connect() as connection:
            assert number(connection, "select count(*) from t") == 5100
        amcheck(new.port, ["postgres"])
        new.process.kill()
        last = cluster.start_writer()
        with last.connect() as connection:
            assert value(connection, "show work_mem") == "22222kB"
            assert number(connection, "select count(*) from t") == 5100
