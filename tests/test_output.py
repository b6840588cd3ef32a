"""What is printed: its copy in log.txt, and lines on the progress where there is no terminal."""

import io
import re
import sys
import time

import pytest
from tqdm import tqdm

from support import output
from support.output import Progress, Transcript, clock


def test_a_transcript_holds_the_lines_of_both_streams_before_and_after_it_has_a_file(tmp_path, capsys):
    before = sys.stdout, sys.stderr
    with Transcript() as transcript:
        print("early")
        transcript.write_to(tmp_path / "log.txt")
        print("out", "put")
        print("error", file=sys.stderr)
        print("not a whole line", end="")
    assert (sys.stdout, sys.stderr) == before
    assert (tmp_path / "log.txt").read_text() == "early\nout put\nerror\n"
    assert capsys.readouterr() == ("early\nout put\nnot a whole line", "error\n")


def test_a_transcript_is_appended_to_and_ends_with_the_traceback_of_a_bug(tmp_path):
    (tmp_path / "log.txt").write_text("of the first start\n")
    with pytest.raises(ZeroDivisionError), Transcript() as transcript:  # noqa: PT012
        transcript.write_to(tmp_path / "log.txt")
        1 / 0  # noqa: B018
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert lines[:2] == ["of the first start", "Traceback (most recent call last):"]
    assert lines[-1] == "ZeroDivisionError: division by zero"


def test_a_terminal_stays_one_and_its_bars_are_not_copied(tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with Transcript() as transcript:
        transcript.write_to(tmp_path / "log.txt")
        for _ in tqdm(range(3), "a bar", leave=False, disable=None, mininterval=0):
            pass
        print("main.py: stopped", file=sys.stderr)
    assert "a bar" in terminal.getvalue()
    assert (tmp_path / "log.txt").read_text() == "main.py: stopped\n"


def test_a_transcript_without_a_file_any_more_goes_on(tmp_path, capsys):
    with Transcript() as transcript:
        transcript.write_to(tmp_path / "log.txt")
        print("kept")
        transcript.write_to(None)
        print("printed only")
    assert (tmp_path / "log.txt").read_text() == "kept\n"
    assert capsys.readouterr().out == "kept\nprinted only\n"


def test_progress_is_a_line_a_minute_where_there_is_no_terminal(capsys, monkeypatch):
    now = iter([0.0, 1.0, 2.0, 30.0, 61.0, 61.0, 61.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    monkeypatch.setattr(Progress, "said", 0.0)
    with Progress("epoch 3", 200, run_left=lambda share: 3600 / share) as progress:
        progress.update(25)
        progress.show({"Class": "0.25", "Shared": "0.5"})
        progress.update(25)
        progress.update(25)
    assert capsys.readouterr().out == (
        "epoch 3: 38% of 200 images, 1 images/s, Class 0.25, Shared 0.5, left: 0:01:42, of the run 2:40:00\n"
    )


def test_what_cannot_say_how_far_it_is_says_for_how_long_it_has_been_running(capsys, monkeypatch):
    monkeypatch.setattr(output, "INTERVAL", 0)
    with output.said_each_minute("clustering"):
        while not re.search(r"clustering: for \d+:\d\d:\d\d\n", capsys.readouterr().out):
            time.sleep(0.001)
    with output.said_each_minute("at once"):
        pass


def test_durations():
    assert [clock(seconds) for seconds in (0, 59.6, 3599, 90_000)] == ["0:00:00", "0:01:00", "0:59:59", "25:00:00"]
