"""Progress bars in log files."""

import sys

from ssl_vit.runtime import progress
from ssl_vit.runtime.progress import progress_bar


def test_progress_bar_is_silent_in_a_log_file_during_short_work(capsys):
    for _ in progress_bar(range(100), desc="short"):
        pass
    assert capsys.readouterr().err == ""


def test_progress_bar_writes_few_lines_to_a_log_file(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.tqdm, "monitor_interval", 0)
    with progress_bar(total=100, desc="long") as bar:
        monkeypatch.setattr(bar, "_time", lambda: now[0])
        bar.start_t = bar.last_print_t = 0.0
        for _ in range(100):
            now[0] += 1.0
            bar.update()
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.strip()]
    assert 2 <= len(lines) <= 11


def test_progress_bar_draws_at_once_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for _ in progress_bar(range(3), desc="drawn"):
        pass
    assert "drawn" in capsys.readouterr().err


def test_progress_bar_shows_nothing_where_it_is_not_wanted(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for _ in progress_bar(range(3), show=False):
        pass
    assert capsys.readouterr().err == ""
