"""Run README's Python blocks with what is installed: ``python tests/first_page.py README.md``.

Not a test of pytest's, which would not start after a plain install.
"""

import re
import sys
from pathlib import Path

if __name__ == "__main__":
    scope = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", Path(sys.argv[1]).read_text(), re.DOTALL):
        exec(block, scope)
