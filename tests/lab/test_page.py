import sys

from sb3_trpo_ext.lab.__main__ import main


def test_the_command_draws_the_page(tmp_path, monkeypatch, capsys):
    picture = tmp_path / "page.png"
    monkeypatch.setattr(sys, "argv", ["lab", "--small", "--out", str(picture)])
    main()
    assert str(picture) in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000
