"""Names that the control plane gives: what they look like and what is refused."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lakebase_operator import naming

DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def test_members_are_named_after_their_cluster() -> None:
    """One grep for the cluster's name finds all of its members."""
    assert naming.safekeeper("demo", 0) == "demo-sk-0"
    assert naming.page_server("demo", 3) == "demo-ps-3"
    assert naming.compute("demo", 2) == "demo-2"


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a_b", "a.b", "1a", "a" * 41, "a\n"])
def test_cluster_names_that_are_no_dns_label_are_refused(name: str) -> None:
    """A name that a certificate or a Service cannot carry fails at the edge, with the reason."""
    with pytest.raises(ValueError, match="1 to 40 characters"):
        naming.check_cluster_name(name)


def test_ordinals_count_from_zero() -> None:
    """A negative ordinal would collide with the separator."""
    with pytest.raises(ValueError, match="counted from 0"):
        naming.compute("demo", -1)


@given(st.from_regex(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", fullmatch=True), st.integers(0, 10_000))
def test_every_member_name_is_a_dns_label(cluster: str, ordinal: int) -> None:
    """Names become host names in certificates and Kubernetes objects."""
    for name in (kind(cluster, ordinal) for kind in (naming.safekeeper, naming.page_server, naming.compute)):
        assert DNS_LABEL.fullmatch(name)


@given(st.from_regex(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", fullmatch=True), st.integers(0, 99), st.integers(0, 99))
def test_members_of_one_cluster_have_different_names(cluster: str, one: int, other: int) -> None:
    """A safekeeper and a compute never share a certificate's name."""
    assert naming.safekeeper(cluster, one) != naming.compute(cluster, other)
