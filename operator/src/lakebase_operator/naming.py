"""Every name that the control plane gives, in one place.

Pure: knows nothing about Kubernetes clients, processes or files. Certificates, configuration files, log lines and
metrics all use these names, so that one grep follows a member through the whole system.
"""

import re

API_GROUP = "lakebase.dev"
API_VERSION = "v1alpha1"

_CLUSTER = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")


def check_cluster_name(cluster: str) -> str:
    """Returns `cluster` unchanged if every name made from it is a DNS label.

    At most 40 characters: a DNS label has 63, and suffixes need some of them.

    Raises: ValueError, the user's fault: the text says what is allowed.
    """
    if _CLUSTER.fullmatch(cluster) is None:
        raise ValueError(
            f"cluster name {cluster!r}: 1 to 40 characters a-z, 0-9 and '-', "
            "beginning with a letter, not ending with '-'"
        )
    return cluster


def safekeeper(cluster: str, ordinal: int) -> str:
    """Returns the name of a safekeeper, `demo-sk-0`: process, certificate, later pod and volume claim."""
    return _member(cluster, "sk-", ordinal)


def page_server(cluster: str, shard: int) -> str:
    """Returns the name of a page server, `demo-ps-0`: process, certificate, later pod and volume claim."""
    return _member(cluster, "ps-", shard)


def compute(cluster: str, ordinal: int) -> str:
    """Returns the name of a compute, `demo-0`: agent, certificate, later pod."""
    return _member(cluster, "", ordinal)


def _member(cluster: str, kind: str, ordinal: int) -> str:
    if ordinal < 0:
        raise ValueError(f"ordinal {ordinal}: counted from 0")
    return f"{check_cluster_name(cluster)}-{kind}{ordinal}"
