"""What every integration test needs: nothing but the end of the shared base backups."""

from collections.abc import Iterator

import pytest

from lakebase_testing.postgres import remove_templates


@pytest.fixture(scope="session", autouse=True)
def base_backups_end_with_the_run() -> Iterator[None]:
    yield
    remove_templates()
