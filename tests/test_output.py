"""What a program says: on stdout, stderr and in log.txt, and lines on the progress where there is no terminal."""

import io
import sys
import time
import warnings

import pytest

from support import output
from support.output import Progress, clock, log, log_to, logged


def test_lines_go_to_stdout_errors_to_stderr_and_both_to_a_file_once_it_is_known(tmp_path, capsys):
    (tmp_path / "log.txt").write_text("of an earlier start\n")
    with logged():
        log.info("early")
        log_to(tmp_path / "log.txt")
        log.warning("a doubt")
        log.error("an error")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("of a library", stacklevel=1)
    log.info("afterwards")
    printed = capsys.readouterr()
    assert printed.out == "early\nwarning: a doubt\n"
    assert printed.err.startswith("an error\n")
    assert "UserWarning: of a library" in printed.err
    assert (tmp_path / "log.txt").read_text().startswith("of an earlier start\nearly\nwarning: a doubt\nan error\n")
    assert "UserWarning: of a library" in (tmp_path / "log.txt").read_text()


def test_a_closed_file_gets_no_more_lines_and_can_be_removed(tmp_path, capsys):
    with logged():
        log_to(tmp_path / "log.txt")
        log_to(None)
        (tmp_path / "log.txt").unlink()
        log.info("printed only")
    assert capsys.readouterr().out == "printed only\n"
    assert not list(tmp_path.iterdir())


def test_a_stream_that_cannot_be_written_ends_nothing(tmp_path, monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    with logged():
        log.info("lost")
        log_to(tmp_path / "log.txt")
        log.info("kept")
    assert (tmp_path / "log.txt").read_text() == "lost\nkept\n"


def test_a_terminal_shows_bars_and_the_file_does_not(tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with logged():
        log_to(tmp_path / "log.txt")
        with Progress("a bar", 3) as progress:
            progress.update(3)
        log.error("main.py: stopped")
    assert "a bar" in terminal.getvalue()
    assert (tmp_path / "log.txt").read_text() == "main.py: stopped\n"


@pytest.fixture
def clock_at(monkeypatch):
    """Let the clock stand still; returns how to set it."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, seconds)


def test_progress_is_a_line_a_minute_where_there_is_no_terminal(caplog, monkeypatch, clock_at):
    monkeypatch.setattr(Progress, "last_line", 0.0)
    monkeypatch.setattr(output, "INTERVAL", 60)
    caplog.set_level("INFO")
    with Progress("epoch 3", 200, run_left=lambda share: 3600 / share) as progress:
        progress.update(25)
        progress.show({"Class": "0.25", "Shared": "0.5"})
        clock_at(30.0)
        progress.update(25)
        clock_at(61.0)
        progress.update(25)
    assert caplog.messages == [
        "epoch 3: 38% of 200 images, 1 images/s, Class 0.25, Shared 0.5, left: 0:01:42, left of the run: 2:40:00"
    ]


def test_durations():
    assert [clock(seconds) for seconds in (0, 59.6, 3599, 90_000)] == ["0:00:00", "0:01:00", "0:59:59", "25:00:00"]
