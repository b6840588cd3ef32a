"""Miniatures of the published data sets, in the README's layout and in that of the official archive.

Each writer takes the source path and returns nothing; TABLE holds what must be read back, written by hand.
"""

import numpy as np
from PIL import Image
from scipy.io import savemat

SIZE = (44, 40)


def write_image(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(str(path))).normal(0, 20, (SIZE[1], SIZE[0], 3))
    Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)).save(path)


COLOURS = [(200, 60, 60), (60, 200, 60), (60, 60, 200), (200, 200, 60), (60, 200, 200), (200, 60, 200)]


def write_cub(root):
    for label, name in enumerate(["001.Albatross", "002.Auklet", "003.Bunting", "004.Cardinal"]):
        for i in range(4):
            write_image(root / "images" / name / f"{name[4:]}_{i:04d}.jpg", COLOURS[label])


CARS = ["AM General Hummer SUV 2000", "Acura Integra Type R 2001", "Volvo 240 Sedan 1993", "BMW M3 Coupe 2012"]


def write_cars_folders(root):
    for label, name in enumerate(CARS):
        for i in range(4):
            write_image(root / "images" / name / f"{label}{i:04d}.jpg", COLOURS[label])


def write_cars_official(root):
    rows = []
    for i in range(16):
        label = i % 4
        path = f"car_ims/{i + 1:06d}.jpg"
        write_image(root / path, COLOURS[label])
        rows.append((path, 1, 1, 20, 20, label + 1, i % 2))
    kinds = [(name, object) for name in ("relative_im_path", "x1", "y1", "x2", "y2", "class", "test")]
    names = np.array(CARS, dtype=object).reshape(1, -1)
    savemat(root / "cars_annos.mat", {"annotations": np.array([rows], dtype=kinds), "class_names": names})


def write_products(root, images, lists):
    """Train classes 1 and 3, test classes 4 and 7; the list is not sorted by class."""
    for split, classes in (("train", (3, 1)), ("test", (4, 7))):
        lines = ["image_id class_id super_class_id path"]
        for i in range(4):
            for label in classes:
                path = f"bicycle_final/{label}_{i}.JPG"
                write_image(root / images / path, COLOURS[label % 6])
                lines.append(f"{len(lines)} {label} 1 {path}")
        (root / lists).mkdir(parents=True, exist_ok=True)
        (root / lists / f"Ebay_{split}.txt").write_text("\n".join(lines) + "\n")


def write_in_shop(root, images, lists):
    """Two training items; items 5 and 9 have a query and two gallery images each."""
    rows = []
    for label, item in enumerate(("id_00000002", "id_00000001", "id_00000009", "id_00000005")):
        for i in range(4 if label < 2 else 3):
            path = f"img/WOMEN/Dresses/{item}/0{i}_1_front.jpg"
            write_image(root / images / path, COLOURS[label])
            status = "train" if label < 2 else ("query" if i == label - 2 else "gallery")
            rows.append(f"{path}      {item}    {status}")
    (root / lists).mkdir(parents=True, exist_ok=True)
    header = f"{len(rows)}\nimage_name item_id evaluation_status\n"
    (root / lists / "list_eval_partition.txt").write_text(header + "\n".join(rows) + "\n")


def write_vehicles(root):
    """Training vehicles 7 and 30; the test sets hold 2, 3 and 4 vehicles with 3 images each."""
    number = 0
    (root / "train_test_split").mkdir(parents=True)
    lists = {"train_list": [30, 7], "test_list_800": [100, 101], "test_list_1600": [100, 101, 102],
             "test_list_2400": [103, 100, 101, 102]}  # fmt: skip
    for name, vehicles in lists.items():
        lines = []
        for vehicle in vehicles:
            for _ in range(4 if name == "train_list" else 3):
                number += 1
                write_image(root / "image" / f"{number:07d}.jpg", COLOURS[vehicle % 6])
                lines.append(f"{number:07d} {vehicle}")
        (root / "train_test_split" / f"{name}.txt").write_text("\n".join(lines) + "\n")


IN_SHOP = "In-shop Clothes Retrieval Benchmark"
LAYOUTS = {
    ("cub200", "readme"): lambda source: write_cub(source / "cub200"),
    ("cub200", "official"): lambda source: write_cub(source / "CUB_200_2011"),
    ("cars196", "readme"): lambda source: write_cars_folders(source / "cars196"),
    ("cars196", "official"): lambda source: write_cars_official(source / "cars196"),
    ("online_products", "readme"): lambda source: write_products(source / "online_products", "images", "Info_Files"),
    ("online_products", "official"): lambda source: write_products(source / "Stanford_Online_Products", "", ""),
    ("in-shop", "readme"): lambda source: write_in_shop(source / "in-shop", "", "Eval"),
    ("in-shop", "official"): lambda source: write_in_shop(source / IN_SHOP, "Img", ""),
    ("vehicle_id", "readme"): lambda source: write_vehicles(source / "vehicle_id"),
    ("vehicle_id", "official"): lambda source: write_vehicles(source / "vehicle_id" / "VehicleID_V1.0"),
}

# per data set: (class names, labels) to train and per test set, and the queries
TABLE = {
    "cub200": {
        "train": (["001.Albatross", "002.Auklet"], [0, 0, 0, 0, 1, 1, 1, 1]),
        "test": (["003.Bunting", "004.Cardinal"], [0, 0, 0, 0, 1, 1, 1, 1]),
    },
    "online_products": {
        "train": (["1", "3"], [1, 0, 1, 0, 1, 0, 1, 0]),
        "test": (["4", "7"], [0, 1, 0, 1, 0, 1, 0, 1]),
    },
    "in-shop": {
        "train": (["id_00000001", "id_00000002"], [1, 1, 1, 1, 0, 0, 0, 0]),
        "test": (["id_00000005", "id_00000009"], [1, 1, 1, 0, 0, 0]),
        "queries": [1, 0, 0, 0, 1, 0],
    },
    "vehicle_id": {
        "train": (["7", "30"], [1, 1, 1, 1, 0, 0, 0, 0]),
        "Set 1": (["100", "101"], [0, 0, 0, 1, 1, 1]),
        "Set 2": (["100", "101", "102"], [0, 0, 0, 1, 1, 1, 2, 2, 2]),
        "Set 3": (["100", "101", "102", "103"], [3, 3, 3, 0, 0, 0, 1, 1, 1, 2, 2, 2]),
    },
}
# folders are sorted by name, the official file has an order of its own
TABLE[("cars196", "readme")] = {
    "train": ([CARS[0], CARS[1]], [0, 0, 0, 0, 1, 1, 1, 1]),
    "test": ([CARS[3], CARS[2]], [0, 0, 0, 0, 1, 1, 1, 1]),
}
TABLE[("cars196", "official")] = {
    "train": ([CARS[0], CARS[1]], [0, 0, 0, 0, 1, 1, 1, 1]),
    "test": ([CARS[2], CARS[3]], [0, 0, 0, 0, 1, 1, 1, 1]),
}
