"""Final returns of tuning runs, folder beside folder.

    python benchmarks/tuning.py defaults defaults_adam

Folders are those of ``benchmarks/results/tuning``, each with ENV/SEED.csv as ``learning.py run --conf-file`` writes them.
"""

from __future__ import annotations

from pathlib import Path

from _measure import argument_parser, print_table
from _runs import Run, read
from _settings import comparable


def table_of(root: Path, folders: list[str]) -> list[list[str]]:
    """A row for each environment and seed that any of the folders has.

    :raises ValueError: for a folder without runs, or whose runs on one environment differ in setting or budget
    """
    found = {folder: runs_of(root / folder) for folder in folders}
    names = sorted({name for runs in found.values() for name in runs}, key=lambda name: (name.parent, int(name.stem)))
    return [
        [f"{name.parent}, {name.stem}", *(f"{runs[name].final:.0f}" if name in runs else "" for runs in found.values())]
        for name in names
    ]


def runs_of(folder: Path) -> dict[Path, Run]:
    """A folder's runs, by ENV/SEED.csv."""
    runs = {path.relative_to(folder): read(path) for path in folder.glob("*/*.csv")}
    if not runs:
        raise ValueError(f"expected ENV/SEED.csv below {folder}, found none")
    for env_id in {name.parent for name in runs}:
        alike = [(comparable(run.about), run.about.get("timesteps")) for name, run in runs.items() if name.parent == env_id]
        if any(made != alike[0] for made in alike):
            raise ValueError(f"expected runs of one setting and budget below {folder / env_id}, got several")
    return runs


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
