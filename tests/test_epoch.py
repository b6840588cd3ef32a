"""The lines that the demo ends with."""

from pathlib import Path

import pytest

from report import epoch


@pytest.mark.parametrize(
    ("of_background", "found"), [(0.8, "mined: the background"), (0.3, "mined: nothing clear, most the background")]
)
def test_the_demo_ends_with_what_was_learned_what_to_look_at_and_what_to_try(of_background, found):
    mined = {"Before Epoch": 4, "NMI class": 0.36, "NMI size": 0.01, "NMI background": of_background}
    rows = {"mining": [mined], "val": [{"Recall @ 1": 0.8}]}
    lines = epoch.lesson(rows, {"Recall @ 1": 0.25}, Path("runs/demo")).splitlines()
    assert [line.split(":")[0] for line in lines] == ["learned", "look at", "try next"]
    assert "is 0.80, before training 0.25" in lines[0]
    assert f"{found} (NMI of the labels with it {of_background:.2f}, with the class 0.36)" in lines[0]
    assert "runs/demo/page.html" in lines[1]
    assert "demo --task_p 1 0 --adv_weights 0" in lines[2]
