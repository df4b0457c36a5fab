"""Checks that whoever extends this package proves their work with, in one line.

``check_snapshot(make_env)``: an environment returns to its snapshots, bit for bit.
"""

from sb3_trpo_ext.sampling.snapshot import check_snapshot

__all__ = ["check_snapshot"]
