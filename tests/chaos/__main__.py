"""`python -m chaos --seconds N [--seed S]`: a chaos run; prints and asserts every number, ends with "N passed, M failed"."""

import argparse
import random
import sys
from collections.abc import Sequence

from chaos.run import Plan, run
from lakebase_testing.postgres import remove_templates


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument(
        "--seconds", type=int, default=120, help="length of the run; minimums scale with it (default 120)"
    )
    parser.add_argument("--seed", type=int, default=None, help="of the schedule of faults; printed, random by default")
    parser.add_argument("--no-io-uring", action="store_true", help="forbid io_uring to all processes (seccomp)")
    options = parser.parse_args(arguments)
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 32)
    try:
        checks = run(Plan(seconds=options.seconds, seed=seed), no_io_uring=options.no_io_uring)
    finally:
        remove_templates()
    print(checks.text(), flush=True)
    return 0 if checks.good() else 1


if __name__ == "__main__":
    sys.exit(main())
