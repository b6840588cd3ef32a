"""The command evaluate.py: a stored run scored, embeddings stored, and what it refuses."""

import os
import shutil
import sys
import zipfile
from pathlib import Path

import layouts
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CPU_DIGITS, refused, run, run_in_process, small_flags, write_class_folders

import datasets
import evaluate
import netlib
from data.images import read_image


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A stored run of two epochs on a data set "tiny", whose training classes are half held out."""
    folder = tmp_path_factory.mktemp("stored")
    write_class_folders(folder / "source" / "tiny", per_class=(5,) * 8)
    write_class_folders(folder / "source" / "other", per_class=(3, 3, 4, 4))
    return run(
        small_flags(folder / "source", folder, "--seed", 5, "--n_epochs", 2, "--eval_every", 1, "--val_classes", 0.5)
    )


def scored(capsys, *argv):
    """Run evaluate.py; return {heading: {score: [now, logged in the epoch]}} of what it printed."""
    capsys.readouterr()
    run(argv, evaluate)
    tables = {}
    for line in capsys.readouterr().out.splitlines():
        cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
        if ", " in line:
            rows = tables[line] = {}
        elif len(cells) > 1:
            rows[cells[0]] = cells[1:]
    return tables


SCORES = ["NMI", "F1", *(f"Recall @ {k}" for k in (1, 2, 4, 8)), "mAP @ R", "R-Precision"]


@CPU_DIGITS
@pytest.mark.parametrize("checkpoint", ["checkpoint.pth.tar", "last.pth.tar"])
def test_a_stored_run_scores_as_logged_to_the_last_digit(stored, capsys, checkpoint):
    tables = scored(capsys, stored, *(["--checkpoint", checkpoint] if checkpoint == "last.pth.tar" else []))
    log = pd.read_csv(stored / "log_val_Class.csv", dtype=str)
    assert log["Epochs"].tolist() == ["0", "1"]
    row = log.iloc[-1 if checkpoint == "last.pth.tar" else log["Recall @ 1"].astype(float).idxmax()]
    headings = [f"{stored}/{checkpoint}, Class embedding of {of}" for of in ("20 tiny images", "10 tiny images, Val")]
    assert list(tables) == headings
    for heading, prefix in zip(headings, ("", "Val ")):
        assert list(tables[heading]) == ["score", *SCORES]
        assert tables[heading]["score"] == ["now", f"logged in epoch {row['Epochs']}"]
        for name in SCORES:
            assert tables[heading][name] == [row[prefix + name], row[prefix + name]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a device without TF32")
def test_a_run_with_tf32_is_scored_without_it_where_the_device_has_none(stored, tmp_path, capsys):
    content = torch.load(stored / "last.pth.tar", weights_only=True)
    content["flags"] |= {"tf32": True, "amp": "bf16"}
    torch.save(content, tmp_path / "last.pth.tar")
    images = stored.parent.parent / "source" / "tiny" / "images"
    for more in ([], ["--embed", images, "--save_embeddings", tmp_path / "e.npz"]):
        capsys.readouterr()
        run([tmp_path / "last.pth.tar", *more], evaluate)
        said = "embedding in bf16: this device does not support the run's --tf32\n"
        assert capsys.readouterr().out.count(said) == 1  # once for both test sets


def test_what_was_not_logged_stands_alone(stored, capsys):
    path = stored / "checkpoint.pth.tar"
    tables = scored(capsys, path, "--embedding", "Shared")
    assert f"{path}, Shared embedding of 20 tiny images" in tables
    for rows in [*tables.values(), *scored(capsys, stored, "--dataset", "other").values()]:
        assert all(len(cells) == 1 for cells in rows.values())
    assert list(scored(capsys, stored, "--dataset", "other")) == [f"{path}, Class embedding of 8 other images"]


def test_embeddings_are_stored_for_other_tools(stored, tmp_path, capsys):
    rows = scored(capsys, stored, "--save_embeddings", tmp_path / "e.npz")
    with np.load(tmp_path / "e.npz") as kept:
        assert kept["embeddings"].shape == (20, 128)
        np.testing.assert_allclose(np.linalg.norm(kept["embeddings"], axis=1), 1, rtol=1e-5)
        assert kept["labels"].tolist() == np.repeat(range(4), 5).tolist()
        assert kept["class_names"].tolist() == [f"class_{i:02d}" for i in range(4, 8)]
        assert kept["is_query"].all()
        assert [Path(path).parent.name for path in kept["paths"][::5]] == kept["class_names"].tolist()
        scores = evaluate.retrieval_scores(kept["embeddings"], kept["labels"], [1])
    assert next(iter(rows.values()))["Recall @ 1"][0] == repr(scores["Recall @ 1"])
    assert sorted(os.listdir(tmp_path)) == ["e.npz", "e_val.npz"]
    argv = [stored, "--save_embeddings", tmp_path / "e.npz"]
    assert "exists already; nothing is overwritten" in refused(capsys, argv, evaluate)
    (tmp_path / "e.npz").unlink()
    assert "e_val.npz exists already; nothing is overwritten" in refused(capsys, argv, evaluate)
    assert os.listdir(tmp_path) == ["e_val.npz"]


@pytest.mark.parametrize("more", [[], ["--embed"]])
def test_a_checkpoint_is_read_once(stored, tmp_path, monkeypatch, more):
    checked, testzip = [], zipfile.ZipFile.testzip

    def check(archive):
        checked.append(archive.filename)
        return testzip(archive)

    monkeypatch.setattr(zipfile.ZipFile, "testzip", check)
    images = [stored.parent.parent / "source" / "tiny" / "images", "--save_embeddings", tmp_path / "e.npz"]
    run([stored, *more, *(images if more else [])], evaluate)
    assert checked == [str(stored / "checkpoint.pth.tar")]


def test_every_image_below_a_folder_is_embedded_and_broken_ones_are_named(stored, tmp_path, capsys):
    source = stored.parent.parent / "source" / "tiny" / "images"
    for i, name in enumerate(["a/one.jpg", "a/b/two.JPG", "c/broken.png", "three.jpg", "a/LICENSE"]):
        path = tmp_path / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        is_image = path.stem not in ("broken", "LICENSE")
        path.write_bytes((source / "class_04" / f"{i}.jpg").read_bytes() if is_image else b"no image")
    (tmp_path / "mine" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    argv = [stored, "--embed", tmp_path / "mine", "--save_embeddings", tmp_path / "e.npz", "--embedding", "Shared"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(argv, evaluate)
    printed = capsys.readouterr()
    assert stop.value.code == 1
    assert f"skipped 1 other file: {tmp_path}/mine/a/LICENSE\n" in printed.out
    assert f"skipped 1 dead link: {tmp_path}/mine/gone.jpg\n" in printed.out
    assert printed.err.endswith(
        "evaluate.py: finished, 3 images stored; left out: 1 dead link, 1 broken image, see above\n"
    )
    assert f"cannot decode the image {tmp_path}/mine/c/broken.png" in printed.out
    with np.load(tmp_path / "e.npz") as kept:
        names = [str(Path(path).relative_to(tmp_path / "mine")) for path in kept["paths"]]
        assert names == ["a/b/two.JPG", "a/one.jpg", "three.jpg"]
        embeddings = kept["embeddings"]
    transform = datasets.test_transform(32)
    batch = torch.stack([transform(read_image(str(source / "class_04" / f"{i}.jpg"))) for i in (1, 0, 3)])
    with torch.no_grad():
        expected = netlib.load(stored)(batch)["Shared"]
    np.testing.assert_allclose(embeddings, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert "exists already" in refused(capsys, argv, evaluate)
    argv[-3] = tmp_path / "f.npz"
    argv[2] = tmp_path / "nowhere"
    assert f"--embed {tmp_path}/nowhere: no images" in refused(capsys, argv, evaluate)
    (tmp_path / "mine" / "a" / "folder.png").mkdir()
    (tmp_path / "mine" / "._one.jpg").write_bytes(b"of another system")
    argv[2] = tmp_path / "mine" / "c"
    with pytest.raises(SystemExit) as stop:
        run(argv, evaluate)
    assert (stop.value.code, (tmp_path / "f.npz").exists()) == (1, False)
    (tmp_path / "mine" / "c" / "broken.png").unlink()
    (tmp_path / "mine" / "gone.jpg").unlink()
    argv[2] = tmp_path / "mine"
    run(argv, evaluate)
    assert len(np.load(tmp_path / "f.npz")["paths"]) == 3
    assert "--embed: give --save_embeddings FILE.npz" in refused(capsys, [stored, "--embed", tmp_path], evaluate)


def test_each_test_set_is_scored_with_its_own_checkpoint(tmp_path, capsys):
    layouts.LAYOUTS["vehicle_id", "readme"](tmp_path / "source")
    flags = ["--dataset", "vehicle_id", "--n_epochs", 2, "--bs", 4, "--shared_num_classes", 2, "--eval_every", 2]
    folder = run(small_flags(tmp_path / "source", tmp_path, *flags))
    tables = scored(capsys, folder, "--save_embeddings", tmp_path / "e.npz")
    log = pd.read_csv(folder / "log_val_Class.csv", dtype=str)
    assert log["Epochs"].tolist() == ["1"]
    written = {path.name for path in folder.iterdir()}
    for i, (heading, rows) in enumerate(tables.items(), start=1):
        n_images = (6, 9, 12)[i - 1]
        assert (
            heading == f"{folder}/checkpoint_set{i}.pth.tar, Class embedding of {n_images} vehicle_id images, Set {i}"
        )
        assert rows["NMI"] == [log[f"Set {i} NMI"][0]] * 2
        assert rows["Recall @ 1"] == [log[f"Set {i} Recall @ 1"][0]] * 2
        assert (tmp_path / f"e_set{i}.npz").exists()
        drawn = {f"InfoPlot_Class_set{i}.svg", f"sample_recoveries_set{i}.png", f"sample_recoveries_Shared_set{i}.png"}
        assert drawn <= written
    assert i == 3
    assert not {"checkpoint.pth.tar", "InfoPlot_Class.svg", "sample_recoveries.png"} & written


def test_what_cannot_be_scored_is_one_line(stored, tmp_path, capsys):
    path, contents = tmp_path / "checkpoint.pth.tar", torch.load(stored / "checkpoint.pth.tar", weights_only=True)
    torch.save(contents | {"flags": contents["flags"] | {"arch": "resnet50"}}, path)
    assert f"{path}: not the weights of resnet50" in refused(capsys, [path], evaluate)
    assert "absent.pth.tar: no such" in refused(capsys, [stored, "--checkpoint", "absent.pth.tar"], evaluate)
    assert "no images of --dataset" in refused(capsys, [stored, "--source_path", tmp_path], evaluate)
    contents["state_dict"]["heads.Class.bias"][:] = torch.nan
    torch.save(contents, path)
    assert "Class features are not finite" in refused(capsys, [path], evaluate, code=1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["a", "b"], "2 runs; give one, or --compare"),
        (["a", "--csv", "t.csv"], "--csv: goes only with --compare"),
        (["a", "--over", "seed"], "--over: goes only with --compare"),
        (["a", "--against", "b"], "--against: goes only with --compare"),
        (["a", "--compare", "--checkpoint", "x"], "--checkpoint: does not go with --compare"),
        (["a", "--compare", "--embedding", "Class"], "--embedding: does not go with --compare"),  # given at its default
        (["a", "--compare", "--gpu", "0"], "--gpu: does not go with --compare"),
        (["a", "--compare", "--embed", "x"], "--embed: does not go with --compare"),
        (["a", "--embed", "x", "--csv", "t.csv"], "--csv: does not go with --embed"),
        (["a", "--embed", "x", "--save_embeddings", "x.npz", "--dataset", "b"], "--dataset: does not go with --embed"),
        (["a", "--compare", "--against", "b", "--over", "seed"], "--against: does not go with --over"),
        (["a", "--compare", "--plot", "x.jpeg"], "ends in .svg or .png or .pdf"),
        (["a", "--save_embeddings", "x.txt"], "ends in .npz"),
        (["a", "--save_embeddings", "nowhere/x.npz"], "there is no folder nowhere"),
        ([], "the following arguments are required: RUN"),
    ],
)
def test_bad_flags_are_one_line(flags, message, capsys):
    assert message in refused(capsys, flags, evaluate)


def test_files_that_exist_or_cannot_be_written_are_refused(tmp_path, capsys):
    for name, flag in (("t.csv", "--csv"), ("p.svg", "--plot")):
        (tmp_path / name).write_text("kept")
        line = refused(capsys, ["a", "--compare", flag, tmp_path / name], evaluate)
        assert f"{flag} {tmp_path / name}: exists already; nothing is overwritten" in line
        assert (tmp_path / name).read_text() == "kept"
    (tmp_path / "closed").mkdir(mode=0o555)
    if os.access(tmp_path / "closed", os.W_OK):
        pytest.skip("root may write anywhere")
    line = refused(capsys, ["a", "--compare", "--csv", tmp_path / "closed" / "t.csv"], evaluate)
    assert f"there is no folder {tmp_path / 'closed'} that can be written to" in line


def test_table_and_plot_in_the_same_file_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "are the same file" in refused(capsys, ["a", "--compare", "--csv", "x.svg", "--plot", "./x.svg"], evaluate)


def test_scores_of_other_images_than_the_runs_are_told(stored, tmp_path, capsys):
    shutil.copytree(stored.parent.parent / "source", tmp_path / "source")
    images = tmp_path / "source" / "tiny" / "images"
    run([stored, "--source_path", tmp_path / "source"], evaluate)
    assert "warning" not in capsys.readouterr().out
    for name, which in (("class_07", "test images"), ("class_03", "training images")):  # the latter are held out
        image = images / name / "1.jpg"
        content = image.read_bytes()
        shutil.copy(images / "class_00" / "0.jpg", image)
        run([stored, "--source_path", tmp_path / "source"], evaluate)
        image.write_bytes(content)
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
        assert f": the images have changed since the run was scored: {which}: different files or class names;" in line


def run_where_a_folder_cannot_be_read(folder, argv):
    """Run evaluate.py where the system refuses to list a folder."""

    def refuse(event, args):
        if event == "os.scandir" and args[0] == folder:
            raise PermissionError(13, "Permission denied", folder)

    sys.addaudithook(refuse)
    run(argv, evaluate)


def test_folders_that_cannot_be_read_are_named_and_the_rest_is_embedded(stored, tmp_path):
    images = write_class_folders(tmp_path / "new") / "images"
    argv = [stored, "--embed", images, "--save_embeddings", tmp_path / "new.npz"]
    process = run_in_process(run_where_a_folder_cannot_be_read, str(images / "class_02"), argv)
    assert (process.returncode, process.stderr) == (
        1, "evaluate.py: finished, 15 images stored; left out: 1 unreadable folder, see above\n"
    )  # fmt: skip
    assert len(np.load(tmp_path / "new.npz")["paths"]) == 15


def test_the_page_of_an_earlier_versions_run_shows_what_its_checkpoint_holds(stored, tmp_path, capsys):
    folder = shutil.copytree(stored, tmp_path / "runs" / "run")
    for name in ("run.json", "page.html", "InfoPlot_Class.svg"):
        (folder / name).unlink()
    run([folder, "--page"], evaluate)
    assert capsys.readouterr().out == f"page: {folder}/page.html\n"
    page = (folder / "page.html").read_text()
    before = torch.load(folder / "last.pth.tar", weights_only=True)["progress"]["initial_scores"]
    assert f"before training {before['Recall @ 1']:.4f}" in page
    assert "trains on 20 images of 4 classes" in page
    assert (folder / "InfoPlot_Class.svg").exists()
    assert (folder.parent / "index.html").exists()
