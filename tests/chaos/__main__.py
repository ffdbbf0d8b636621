"""`python -m chaos --seconds N [--seed S]`: a chaos run; prints and asserts every number, ends with "N passed, M failed"."""

import argparse
import random
import sys
from collections.abc import Sequence

from chaos.run import Plan, run
from lakebase_testing.postgres import remove_templates
from lakebase_testing.s3 import end_s3


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument(
        "--seconds", type=int, default=120, help="length of the run; minimums scale with it (default 120)"
    )
    parser.add_argument("--seed", type=int, default=None, help="of the schedule of faults; printed, random by default")
    parser.add_argument("--no-io-uring", action="store_true", help="forbid io_uring to all processes (seccomp)")
    parser.add_argument(
        "--page-servers",
        type=int,
        default=0,
        help="page servers that writers read from (default 0: a base backup instead)",
    )
    parser.add_argument(
        "--object-storage", choices=("file", "s3"), default="file", help="of page servers (default file, a directory)"
    )
    options = parser.parse_args(arguments)
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 32)
    try:
        plan = Plan(
            seconds=options.seconds, seed=seed, page_servers=options.page_servers, object_storage=options.object_storage
        )
        checks = run(plan, no_io_uring=options.no_io_uring)
    finally:
        remove_templates()
        end_s3()
    print(checks.text(), flush=True)
    return 0 if checks.good() else 1


if __name__ == "__main__":
    sys.exit(main())
