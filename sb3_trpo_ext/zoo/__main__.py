"""``python -m sb3_trpo_ext.zoo VERB ...``: rl_zoo3's verbs, our algorithms included.

Without ``--conf-file``, ``train --algo trpo_ext`` uses the hyperparameters that come with the package.
"""

from __future__ import annotations

import argparse
import sys

from sb3_trpo_ext.zoo.registration import ALGORITHMS, config_path, register

VERBS = ("train", "enjoy", "plot_train", "all_plots", "plot_from_file")


def with_own_config(arguments: list[str]) -> list[str]:
    """The arguments of ``train``, with our configuration file where none is named and the algorithm is ours."""
    parser = argparse.ArgumentParser(add_help=False)  # of rl_zoo3's options, these two, in every spelling
    parser.add_argument("--algo")
    parser.add_argument("-conf", "--conf-file")
    given, _ = parser.parse_known_args(arguments)
    if given.algo not in ALGORITHMS or given.conf_file is not None:
        return arguments
    return [*arguments, "--conf-file", str(config_path(given.algo))]


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in VERBS:
        got = sys.argv[1] if len(sys.argv) > 1 else "nothing"
        sys.exit(f"usage: python -m sb3_trpo_ext.zoo {{{','.join(VERBS)}}} ...; got {got}")
    register()
    from rl_zoo3.cli import main as rl_zoo3_main

    if sys.argv[1] == "train":
        sys.argv[2:] = with_own_config(sys.argv[2:])
    rl_zoo3_main()


if __name__ == "__main__":
    main()
