"""What every integration test needs: nothing but the end of what the run shares, and an S3 server for those that ask."""

from collections.abc import Iterator

import pytest

from lakebase_testing.page_service import ObjectStorage
from lakebase_testing.postgres import remove_templates
from lakebase_testing.s3 import end_s3, s3_url


@pytest.fixture(scope="session", autouse=True)
def base_backups_end_with_the_run() -> Iterator[None]:
    yield
    remove_templates()
    end_s3()


@pytest.fixture
def storage(request: pytest.FixtureRequest) -> ObjectStorage:
    """A kind of object storage, given by `parametrize(..., indirect=True)`; a test of S3 is skipped where there is none."""
    kind: ObjectStorage = request.param
    if kind == "s3" and s3_url() is None:
        pytest.skip("no S3 server: set LAKEBASE_TEST_S3_URL and AWS_*, or install Go (scripts/s3-server)")
    return kind
