"""``python -m sb3_trpo_ext.zoo VERB ...``: rl_zoo3's verbs, our algorithms included.

Without ``--conf-file``, ``train`` with one of our algorithms uses the hyperparameters that come with the package.
"""

from __future__ import annotations

import argparse
import runpy
import sys

from sb3_trpo_ext.zoo.registration import ALGORITHMS, config_path, register

VERBS = {
    "train": "train, resume (-i MODEL) or search hyperparameters (-optimize)",
    "enjoy": "watch or evaluate a trained model",
    "record_video": "film a trained model",
    "plot_train": "plot training returns of runs below a log folder",
    "all_plots": "gather evaluations of several runs into curves, a table and a file",
    "plot_from_file": "plot what all_plots gathered",
}


def usage() -> str:
    """What to type, verb by verb, with our algorithms by name."""
    width = max(map(len, VERBS))
    return "\n".join(
        [
            f"usage: python -m sb3_trpo_ext.zoo {{{','.join(VERBS)}}} ...",
            "",
            *(f"  {verb.ljust(width)}  {meaning}" for verb, meaning in VERBS.items()),
            "",
            f"values of --algo that are ours: {', '.join(ALGORITHMS)}; VERB --help tells the options",
        ]
    )


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
    verb = sys.argv[1] if len(sys.argv) > 1 else "nothing"
    if verb in ("-h", "--help"):
        print(usage())
        return
    if verb not in VERBS:
        sys.exit(f"{usage()}\n\nexpected one of the verbs, got {verb}")
    try:
        register()
    except ImportError as error:
        sys.exit(str(error))
    from rl_zoo3.cli import main as rl_zoo3_main

    if verb == "record_video":  # a script of rl_zoo3's that is not among its own verbs
        del sys.argv[1]
        runpy.run_module("rl_zoo3.record_video", run_name="__main__")
        return
    if verb == "train":
        sys.argv[2:] = with_own_config(sys.argv[2:])
    rl_zoo3_main()


if __name__ == "__main__":
    main()
