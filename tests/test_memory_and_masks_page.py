"""The page's examples run as they stand, from top to bottom."""

import re
from pathlib import Path

import sb3_trpo_ext
from sb3_trpo_ext import TRPOExt

PAGE = Path(sb3_trpo_ext.__file__).parents[1] / "docs" / "memory_and_masks.md"


def test_the_examples_run():
    scope = {"__name__": "page"}
    for example in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(example, str(PAGE), "exec"), scope)
    assert scope["action"] < 4 and scope["mean"] > 5.0 and issubclass(scope["MyTRPO"], TRPOExt)
    assert scope["state"][0].shape == (1, 1, 16) and scope["score"] == 1.0
