"""Command line of the control plane. This version can say its version and nothing else."""

import argparse
from collections.abc import Sequence
from importlib.metadata import version


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="lakebase-operator",
        description="Control plane of Lakebase.",
        epilog="There are no subcommands in this version: logs are created, fenced and granted with the `lakebase` "
        "command (see docs/operating.md).",
    )
    parser.add_argument("--version", action="version", version=f"lakebase-operator {version('lakebase-operator')}")
    parser.parse_args(arguments)
    parser.print_help()
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
