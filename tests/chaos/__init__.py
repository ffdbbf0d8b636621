"""A lakebase under load while its processes are killed, frozen and starved at random, under a printed seed.

`run.py` is the run, `kinds.py` what can go wrong, `verdict.py` what must hold afterwards; `fenced_reads.py` is a
program of its own.
"""
