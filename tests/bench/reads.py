"""What a page server's metrics say about the reads between two moments."""

from dataclasses import dataclass

from lakebase_testing.page_service import PageServer


@dataclass(frozen=True)
class Reads:
    """Sums over all pages that were made; `since` turns them into averages."""

    pages: float
    layers: float
    blocks: float
    values: float
    # Blocks that were not in memory.
    disk: float

    @staticmethod
    def of(page_server: PageServer) -> "Reads":
        """The sums so far."""
        return Reads(
            page_server.figure("layers_visited_count"),
            page_server.figure("layers_visited_sum"),
            page_server.figure("blocks_read_sum"),
            page_server.figure("values_applied_sum"),
            page_server.figure("local_reads_total"),
        )

    def since(self, earlier: "Reads") -> "Reads":
        """Averages per page of what happened since.

        Raises: AssertionError when no page was read.
        """
        pages = self.pages - earlier.pages
        assert pages > 0, "no page was read"
        return Reads(
            pages,
            (self.layers - earlier.layers) / pages,
            (self.blocks - earlier.blocks) / pages,
            (self.values - earlier.values) / pages,
            (self.disk - earlier.disk) / pages,
        )
