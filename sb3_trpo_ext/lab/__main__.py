"""``python -m sb3_trpo_ext.lab``: draw the page of pictures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch as th

from sb3_trpo_ext.lab.page import draw_page


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sb3_trpo_ext.lab", description="Draw the theory of TRPO on finite MDPs.")
    parser.add_argument("--out", type=Path, default=Path("lab.png"), help="the PNG to write (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="fewer steps and samples, to see that it works")
    arguments = parser.parse_args()
    th.set_num_threads(1)
    picture = arguments.out if arguments.out.suffix else arguments.out.with_suffix(".png")
    try:
        draw_page(picture, small=arguments.small)
    except ImportError as error:
        sys.exit(str(error))
    print(f"picture: {picture}")


if __name__ == "__main__":
    main()
