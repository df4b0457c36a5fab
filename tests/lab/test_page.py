import sys
from pathlib import Path

from sb3_trpo_ext.lab.__main__ import main


def test_the_command_draws_the_page_and_says_where(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lab", "--small", "--out", str(tmp_path / "page")])
    main()
    picture = tmp_path / "page.png"
    assert f"picture: {picture}\n" == capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000


def test_the_documents_first_example_runs(capsys):
    page = Path(__file__).parents[2] / "docs" / "lab.md"
    exec(page.read_text().split("```python\n")[1].split("```")[0], {})
    gain, by_the_lemma = map(float, capsys.readouterr().out.splitlines()[0].split())
    assert abs(gain - by_the_lemma) <= 1e-9
