"""Final returns of tuning runs, folder beside folder.

    python benchmarks/tuning.py defaults defaults_adam

Folders are those of ``benchmarks/results/tuning``, each with ENV/SEED.csv as ``learning.py run --conf-file`` writes them.
"""

from __future__ import annotations

from pathlib import Path

from _measure import argument_parser, print_table
from _runs import read


def table_of(root: Path, folders: list[str]) -> list[list[str]]:
    """A row for each environment and seed that any of the folders has.

    :raises ValueError: for a folder without runs
    """
    finals = {
        folder: {path.relative_to(root / folder): read(path).final for path in (root / folder).glob("*/*.csv")}
        for folder in folders
    }
    empty = [folder for folder, found in finals.items() if not found]
    if empty:
        raise ValueError(f"expected ENV/SEED.csv below {root}, in each of {', '.join(folders)}; nothing in {', '.join(empty)}")
    runs = sorted({run for found in finals.values() for run in found}, key=lambda run: (run.parent, int(run.stem)))
    return [
        [f"{run.parent}, {run.stem}", *(f"{found[run]:.0f}" if run in found else "" for found in finals.values())]
        for run in runs
    ]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("folders", nargs="+")
    arguments = parser.parse_args()
    try:
        rows = table_of(arguments.out / "tuning", arguments.folders)
    except ValueError as error:
        parser.error(str(error))
    print_table("Return of the final policy", ("environment, seed", *arguments.folders), rows)


if __name__ == "__main__":
    main()
