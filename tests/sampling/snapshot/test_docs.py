"""The page's examples run as they stand, from top to bottom."""

import re
from pathlib import Path

import sb3_trpo_ext
from sb3_trpo_ext.sampling.snapshot.adapters import _BY_CLASS

PAGE = Path(sb3_trpo_ext.__file__).parents[1] / "docs" / "snapshots.md"


def test_the_examples_run():
    before = dict(_BY_CLASS)
    scope = {"__name__": "page"}
    for example in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(example, str(PAGE), "exec"), scope)
    _BY_CLASS.clear()
    _BY_CLASS.update(before)
    assert len(scope["observations"]) == 4
