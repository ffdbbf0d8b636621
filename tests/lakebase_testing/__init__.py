"""What the suites need to run real processes: a cluster on this machine, faults, clients that remember acknowledgements.

Read `cluster.py` first. Knows nothing about the engine's insides: it uses the command line, the admin ports and PostgreSQL.
"""
