"""What a network is fed: transforms, class-balanced batches, loaders; and the command that describes a data set."""

import multiprocessing
import signal
import subprocess
import sys
from collections import Counter

import layouts
import numpy as np
import pytest
import torch
from conftest import refused, write_class_folders
from PIL import Image
from scipy.stats import binomtest, chisquare
from torchvision import transforms

import datasets
import evaluate
import main
from support.errors import InputError, stop_reason

LABELS = np.repeat(np.arange(7), [9, 4, 12, 5, 4, 6, 1])


def test_evaluation_transform_is_resize_and_centre_crop():
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 255, (150, 200, 3), dtype=np.uint8).repeat(2, 0))
    ours = datasets.test_transform(56)(torch.from_numpy(np.array(pixels)).permute(2, 0, 1))
    pillow = transforms.Compose([transforms.Resize(64), transforms.CenterCrop(56)])(pixels)
    difference = ours.permute(1, 2, 0).numpy().astype(int) - np.asarray(pillow).astype(int)
    assert ours.shape == (3, 56, 56)
    assert np.abs(difference).max() <= 2


def test_augmentation_depends_on_the_seed_alone(shapes):
    dataset = datasets.ImageDataset(shapes[0], datasets.train_transform(48, flip=True))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, label = dataset[(3, 17, 99)]
    assert (torch.get_rng_state() == state).all()
    torch.manual_seed(1)
    again, _ = dataset[(3, 17, 99)]
    other, _ = dataset[(3, 17, 100)]
    assert label == 17
    assert first.dtype == torch.uint8
    assert (first == again).all()
    assert (first != other).any()


def epoch_of(sampler, labels, epoch=0, n_batches=10):
    sampler.set_epoch(epoch, np.asarray(labels), n_batches)
    return list(sampler)


def test_batches_are_runs_of_one_class_without_repeats():
    sampler = datasets.ClassBalancedBatchSampler(16, 4, seed=(1, 0))
    batches = epoch_of(sampler, LABELS, n_batches=50)
    assert len(batches) == len(sampler) == 50
    for batch in batches:
        assert len(batch) == 16
        for start in range(0, 16, 4):
            run = batch[start : start + 4]
            indices = [index for index, _, _ in run]
            assert len({label for _, label, _ in run}) == 1
            assert (LABELS[indices] == run[0][1]).all()
            assert len(set(indices)) == min(4, (run[0][1] == LABELS).sum())


def test_the_two_classes_before_are_not_drawn_and_the_others_evenly():
    sampler = datasets.ClassBalancedBatchSampler(16, 4, seed=(1, 0))
    classes = [draw[1] for batch in epoch_of(sampler, LABELS, n_batches=3000) for draw in batch[::4]]
    assert all(c not in classes[max(i - 2, 0) : i] for i, c in enumerate(classes))
    assert chisquare(list(Counter(classes).values())).pvalue > 1e-3
    after = Counter(classes[i] for i in range(2, len(classes)) if set(classes[i - 2 : i]) == {0, 1})
    assert set(after) == {2, 3, 4, 5, 6}
    assert chisquare(list(after.values())).pvalue > 1e-3


@pytest.mark.parametrize("n_classes", [1, 2, 3])
def test_few_classes_still_fill_batches(n_classes):
    sampler = datasets.ClassBalancedBatchSampler(6, 2, seed=(1, 0))
    batches = epoch_of(sampler, np.arange(12) % n_classes)
    assert {label for batch in batches for _, label, _ in batch} == set(range(n_classes))


def test_order_depends_on_seed_and_epoch_only():
    def draws(seed, epoch):
        return epoch_of(datasets.ClassBalancedBatchSampler(8, 4, seed=(seed, 0)), LABELS, epoch)

    sampler = datasets.ClassBalancedBatchSampler(8, 4, seed=(1, 0))
    later = [epoch_of(sampler, LABELS, epoch) for epoch in range(3)][2]
    assert later == draws(1, 2)
    assert draws(1, 0) != draws(1, 1)
    assert draws(1, 0) != draws(2, 0)


def test_draws_stay_those_of_stored_runs():
    sampler = datasets.ClassBalancedBatchSampler(4, 2, seed=(1, 0), random_pick_p=0.5)
    first, second = epoch_of(sampler, LABELS, epoch=3, n_batches=2)
    assert [draw[:2] for draw in first] == [(10, 5), (38, 5), (25, 3), (28, 3)]
    assert [draw[:2] for draw in second] == [(28, 0), (40, 0), (33, 4), (40, 4)]
    assert first[0][2] == 3050243446650072920


def test_one_image_per_class_shuffles_all_images():
    sampler = datasets.ClassBalancedBatchSampler(10, 1, seed=(1, 0))
    drawn = [draw for batch in epoch_of(sampler, LABELS, n_batches=4) for draw in batch]
    assert len({index for index, _, _ in drawn}) == 40
    assert all(LABELS[index] == label for index, label, _ in drawn)
    assert [index for index, _, _ in drawn] != sorted(index for index, _, _ in drawn)


def test_replaced_images_keep_their_label_at_the_stated_rate():
    sampler = datasets.ClassBalancedBatchSampler(16, 4, seed=(1, 0), random_pick_p=0.2)
    drawn = [draw for batch in epoch_of(sampler, LABELS, n_batches=1000) for draw in batch]
    labels = np.array([label for _, label, _ in drawn])
    sources = LABELS[[index for index, _, _ in drawn]]
    # A replacement comes from any of the 7 clusters with equal chance, so also from its own
    assert binomtest(int((labels != sources).sum()), len(drawn), 0.2 * 6 / 7).pvalue > 1e-3
    counts = np.bincount(sources[labels != sources], minlength=7)
    assert chisquare(counts).pvalue > 1e-3


def test_gaps_in_the_labels_are_harmless():
    labels = np.array([0, 0, 5, 5, 9, 9, 2, 2])
    drawn = [draw for batch in epoch_of(datasets.ClassBalancedBatchSampler(4, 2, seed=(0,)), labels) for draw in batch]
    assert {label for _, label, _ in drawn} == {0, 2, 5, 9}


def test_shares_of_a_batch_are_the_batch():
    whole, *shares = (
        epoch_of(datasets.ClassBalancedBatchSampler(8, 2, (1, 0), 0.2, share), LABELS)
        for share in (None, range(3), range(3, 8))
    )
    assert [first + rest for first, rest in zip(*shares)] == whole


def task_samplers():
    return {
        "Class": datasets.ClassBalancedBatchSampler(8, 2, seed=(1, 0)),
        "Shared": datasets.ClassBalancedBatchSampler(8, 4, seed=(1, 1), random_pick_p=0.5),
    }


@pytest.mark.parametrize("steps", [["Class", "Shared", "Class", "Class", "Shared"], ["Class"], []])
def test_tasks_take_turns_with_the_batches_of_their_own_samplers(steps):
    labels = {"Class": LABELS, "Shared": np.arange(len(LABELS)) % 3}
    sampler = datasets.TaskBatchSampler(task_samplers())
    for epoch in range(2):
        sampler.set_epoch(epoch, labels, list(enumerate(steps)))
        assert len(sampler) == len(steps)
        assert {task: len(single) for task, single in sampler.samplers.items()} == {
            task: steps.count(task) for task in labels
        }
        for _ in range(2):  # a pass changes nothing
            batches = list(sampler)
            assert [[task for task, _ in batch] for batch in batches] == [[task] * 8 for task in steps]
            for task, single in task_samplers().items():
                ours = [[draw for _, draw in batch] for batch in batches if batch[0][0] == task]
                assert ours == epoch_of(single, labels[task], epoch, steps.count(task))


def test_labels_of_a_task_without_a_sampler_change_nothing():
    sampler = datasets.TaskBatchSampler({"Class": task_samplers()["Class"]})
    sampler.set_epoch(0, {"Class": LABELS, "Shared": LABELS}, [(i, "Class") for i in range(3)])
    assert len(list(sampler)) == 3


def worker_ids():
    """Return the ids of this process's loader workers."""
    return {process.pid for process in multiprocessing.active_children() if process.daemon}


def test_workers_change_nothing_and_stay_for_all_passes(shapes):
    images, test = shapes[0], shapes[1].classes(0, 1)
    flipped, plain = (datasets.ImageDataset(images, datasets.train_transform(32, flip)) for flip in (True, False))
    sets = {"Class": flipped, "Shared": plain, "test": datasets.ImageDataset(test, lambda image: image)}
    labels = {"Class": images.labels, "Shared": images.factors["background"]}
    state = torch.get_rng_state()
    loaded, workers = [], []
    for n_workers in (0, 2):
        sampler, pool = datasets.TaskBatchSampler(task_samplers()), datasets.Pool(sets, n_workers, pin_memory=False)
        steps, in_order = datasets.PoolLoader(pool, sampler, flipped), datasets.in_order(pool, "test", 10)
        assert (len(in_order), len(in_order.sampler)) == (3, 24)
        loaded.append([])
        for epoch in range(2):
            sampler.set_epoch(epoch, labels, [(0, "Shared"), (1, "Class"), (2, "Class")])
            loaded[-1] += list(steps)
            next(iter(in_order))  # a pass that is left leaves nothing to the next one
            loaded[-1] += list(in_order)
            workers.append(worker_ids())
        pool.close()
        assert not worker_ids()
    assert [len(ids) for ids in workers] == [0, 0, 2, 2]
    assert workers[2] == workers[3]
    assert (torch.get_rng_state() == state).all()
    assert len(loaded[0]) == len(loaded[1]) == 2 * (3 + 3)  # 24 images in order
    for (pixels, labels), (other_pixels, other_labels) in zip(*loaded):
        assert (pixels == other_pixels).all()
        assert (labels == other_labels).all()
    in_order = torch.cat([pixels for pixels, _ in loaded[1][-3:]])
    assert (in_order.permute(0, 2, 3, 1).numpy() == test.pixels).all()
    for task, single in (("Class", flipped), ("Shared", plain)):
        assert (datasets.NamedDatasets(sets)[task, (3, 1, 7)][0] == single[3, 1, 7][0]).all()


@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_pass_does_not_go_on_with_the_batches_of_another(n_workers):
    numbers = {name: range(first, first + 20) for name, first in (("a", 0), ("b", 100))}
    pool = datasets.Pool(numbers, n_workers, pin_memory=False)
    a, b = (datasets.in_order(pool, name, 4) for name in ("a", "b"))
    first, second = iter(a), iter(b)
    assert next(first).tolist() == [0, 1, 2, 3]
    assert next(second).tolist() == [100, 101, 102, 103]
    with pytest.raises(RuntimeError, match="another pass has begun"):
        next(first)
    assert next(second).tolist() == [104, 105, 106, 107]  # has lost nothing
    again = iter(b)
    assert next(again).tolist() == [100, 101, 102, 103]
    with pytest.raises(RuntimeError, match="another pass has begun"):
        next(second)
    assert torch.cat(list(a)).tolist() == list(range(20))
    pool.close()


@pytest.mark.parametrize("share", [None, range(4, 9)])
def test_without_batches_all_images_or_a_share_come_once_in_order(shapes, share):
    test = shapes[1].classes(0, 1)
    dataset = datasets.ImageDataset(test, lambda image: image)
    loader = datasets.make_loader(dataset, n_workers=0, pin_memory=False, batch_size=4, sampler=share)
    pixels = torch.cat([images for images, _ in loader])
    assert (pixels.permute(0, 2, 3, 1).numpy() == test.pixels[share or range(len(test))]).all()


@pytest.mark.parametrize("n_workers", [0, 1])
def test_broken_image_in_a_loader_is_one_line(class_folders, n_workers):
    broken = class_folders / "tiny" / "images" / "class_00" / "3.jpg"
    broken.write_bytes(b"nothing")
    train, _ = datasets.load_dataset("tiny", class_folders)
    dataset = datasets.ImageDataset(train, datasets.test_transform(32))
    pool = datasets.Pool({"train": dataset}, n_workers, pin_memory=False)
    with pytest.raises(InputError) as error:
        list(datasets.in_order(pool, "train", 4))
    pool.close()  # the traceback would keep the workers
    reason = stop_reason(error.value)
    assert reason.startswith(f"cannot decode the image {broken} ")
    assert "\n" not in reason


class SignalHandlers(torch.utils.data.Dataset):
    """Says what a worker does on Ctrl-C and on SIGTERM."""

    def __len__(self):
        return 1

    def __getitem__(self, _):
        return signal.getsignal(signal.SIGINT) == signal.SIG_IGN, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_workers_leave_ctrl_c_to_their_owner():
    loader = datasets.make_loader(SignalHandlers(), n_workers=1, pin_memory=False)
    owners = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        assert [(bool(ignores), bool(ends)) for ignores, ends in loader] == [(True, True)]
    finally:
        signal.signal(signal.SIGTERM, owners)


def test_counts_that_differ_from_the_official_ones_are_warned_of(tmp_path, shapes):
    layouts.LAYOUTS["in-shop", "readme"](tmp_path)
    warnings = datasets.count_warnings("in-shop", *datasets.load_dataset("in-shop", tmp_path))
    assert warnings == [
        "in-shop, all: 4 classes with 14 images; officially 7,982 with 52,712",
        "in-shop, train: 2 classes with 8 images; officially 3,997 with 25,882",
        "in-shop, query: 2 classes with 2 images; officially 3,985 with 14,218",
        "in-shop, gallery: 2 classes with 4 images; officially 3,985 with 12,612",
    ]
    assert datasets.count_warnings("shapes", shapes[0], {"": shapes[1]}) == []
    layouts.LAYOUTS["vehicle_id", "readme"](tmp_path)
    warnings = datasets.count_warnings("vehicle_id", *datasets.load_dataset("vehicle_id", tmp_path))
    assert "vehicle_id, Set 2: 3 classes with 9 images; officially 1,600 with 13,377" in warnings


def test_classes_on_both_sides_and_images_listed_twice_are_warned_of(tmp_path):
    layouts.LAYOUTS["online_products", "readme"](tmp_path)
    path = tmp_path / "online_products" / "Info_Files" / "Ebay_test.txt"
    row = path.read_text().splitlines()[1]
    path.write_text(path.read_text() + f"{row}\n99 3 1 bicycle_final/3_0.JPG\n")
    warnings = datasets.count_warnings("online_products", *datasets.load_dataset("online_products", tmp_path))
    assert "online_products, test: 1 class also in train: 3" in warnings
    assert "online_products, test: 1 image listed before in the same split" in warnings


def test_command_prints_splits_and_checks_images(tmp_path, capsys):
    images = write_class_folders(tmp_path / "mine", per_class=(2, 5, 3, 1)) / "images"
    (images / "empty").mkdir()
    assert datasets.main(["mine", "--source_path", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"layout: {images}/<class>/<image>, the first half of the classes trains, the rest tests",
        "split       classes   images  images per class: least, median, most; first and last class",
        "train             2        7  2, 3, 5; class_00 to class_01",
        "test              2        4  1, 2, 3; class_02 to class_03",
        "test: 1 image with no other image of the class; classes: class_03",
        "left out: 1 folder without images: images/empty",
    ]
    assert datasets.main(["mine", "--source_path", str(tmp_path), "--check"]) == 0
    assert "0 images cannot be decoded" in capsys.readouterr().out
    broken = images / "class_01" / "4.jpg"
    broken.write_bytes(broken.read_bytes()[:500])
    assert datasets.main(["mine", "--source_path", str(tmp_path), "--check"]) == 2
    printed = capsys.readouterr().out
    assert f"cannot decode the image {broken}" in printed
    assert printed.count(str(broken)) == 1
    assert "1 image cannot be decoded" in printed
    broken.write_text("no image at all")
    assert datasets.main(["mine", "--source_path", str(tmp_path), "--check"]) == 2
    assert capsys.readouterr().out.count(str(broken)) == 1


def test_command_prints_a_diagnosis_of_several_lines(tmp_path, capsys):
    assert datasets.main(["cub200", "--source_path", str(tmp_path)]) == 2
    first, *others = capsys.readouterr().err.splitlines()
    assert first == f"datasets.py: error: no images of --dataset cub200 in --source_path {tmp_path}"
    assert [line.split("  ")[1] for line in others] == ["looked for", "found", "to do", "get it at"]
    with pytest.raises(SystemExit) as ended:
        datasets.main(["cub200", "--chek"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "datasets.py: error: unrecognized arguments: --chek; did you mean --check?\n"


def test_command_ends_in_one_line_where_nothing_can_be_printed(class_folders):
    command = [sys.executable, datasets.__file__, "tiny", "--source_path", class_folders]
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE)
    assert ended.returncode == 1
    assert ended.stderr.decode().count("\n") == 1


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("here/mine", "mine --source_path here"),
        ("./here", "here --source_path ."),
        ("{cwd}/here/mine", "mine --source_path {cwd}/here"),
        ("./other", "other --source_path Datasets"),
        ("other/", "other --source_path Datasets"),
        ("below/other", "other --source_path Datasets/below"),
        ("../{cwd.name}", "{cwd.name} --source_path .."),
        (".", "{cwd.name} --source_path {cwd.parent}"),
        ("a b/c", "c --source_path 'Datasets/a b'"),
    ],
)
def test_a_path_in_place_of_a_name_is_told_the_flags_that_were_meant(tmp_path, monkeypatch, capsys, name, meant):
    """In all commands that take the name of a data set, and before anything else is done."""
    monkeypatch.chdir(tmp_path)
    write_class_folders(tmp_path / "here" / "mine")
    name, meant = name.format(cwd=tmp_path), meant.format(cwd=tmp_path)
    assert datasets.main([name]) == 2
    assert capsys.readouterr().err.strip() == (
        f"datasets.py: error: {name!r}: give a plain folder name, and where it lies: {meant}"
    )
    for program, argv in ((main, ["--dataset", name]), (evaluate, ["run", "--dataset", name])):
        assert f"--dataset {name!r}: give a plain folder name, and where it lies: --dataset {meant}" in refused(
            capsys, argv, program
        )
