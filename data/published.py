"""Registry of data sets: where they lie, how they are read, what they hold, and what the paper reports on them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from data import readers
from data.custom import read_custom, read_folders
from data.images import Splits

K_VALS = (1, 2, 4, 8)
"""The k of Recall@k for data sets whose entry names no others."""


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a data set.

    Attributes:
        read: reads the data set from its folder.
        archive: folder that its official archive unpacks to.
        landmarks: paths of which any one marks the data set's folder.
        layout: description of what the folder should hold.
        url: where to get it.
        counts: {split: (classes, images)} of the official data set.
        k_vals: the k of Recall@k.
        scores: the paper's results for MIC with margin loss, by their columns in log_val_Class.csv.
        ablations: {flag: {value: Recall@1}}, read off the paper's plots to +-0.002; for cluster_update_freq only
            the two ends of the curve.

    Reference:
        Roth, Brattoli, Ommer: MIC, ICCV 2019, result tables and ablation plots.
    """

    read: Callable[[Path], Splits]
    archive: str = ""
    landmarks: tuple[str, ...] = ("images",)
    layout: str = "images/<class>/<image>"
    url: str = ""
    counts: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    k_vals: tuple[int, ...] = K_VALS
    scores: Mapping[str, float] = field(default_factory=dict)
    ablations: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


CLUSTERS = ("5", "10", "20", "30", "50", "100", "150", "200", "250", "300")
SIZES = ("0", "64", "128", "256", "512", "1024")
PUBLISHED = {
    "cub200": DatasetInfo(
        read=read_folders,
        archive="CUB_200_2011",
        url="https://www.vision.caltech.edu/datasets/cub_200_2011",
        counts={"all": (200, 11788)},
        scores={"Recall @ 1": 0.661, "Recall @ 2": 0.768, "Recall @ 4": 0.856, "NMI": 0.697},
        ablations={
            "shared_num_classes": dict(
                zip(CLUSTERS, (0.604, 0.612, 0.636, 0.647, 0.641, 0.633, 0.621, 0.599, 0.602, 0.587))
            ),
            "cluster_update_freq": {"1": 0.647, "50": 0.628},
            "embed_sizes": dict(zip(SIZES, (0.636, 0.647, 0.657, 0.666, 0.670, 0.667))),
        },
    ),
    "cars196": DatasetInfo(
        read=readers.read_cars,
        archive="cars196",
        landmarks=("images", "car_ims"),
        layout="images/<class>/<image>, or car_ims/<image> with cars_annos.mat",
        url="http://ai.stanford.edu/~jkrause/cars/car_dataset.html",
        counts={"all": (196, 16185)},
        scores={"Recall @ 1": 0.826, "Recall @ 2": 0.891, "Recall @ 4": 0.932, "NMI": 0.684},
        ablations={
            "shared_num_classes": dict(
                zip(CLUSTERS, (0.770, 0.769, 0.781, 0.786, 0.796, 0.798, 0.805, 0.805, 0.801, 0.800))
            ),
            "cluster_update_freq": {"1": 0.800, "50": 0.783},
            "embed_sizes": dict(zip(SIZES, (0.796, 0.817, 0.828, 0.842, 0.850, 0.845))),
        },
    ),
    "online_products": DatasetInfo(
        read=readers.read_online_products,
        archive="Stanford_Online_Products",
        landmarks=("images", "Info_Files", "Ebay_train.txt"),
        layout="images/<category>/<image> and Info_Files/Ebay_train.txt, Ebay_test.txt, or all of them in one folder",
        url="https://cvgl.stanford.edu/projects/lifted_struct",
        counts={"all": (22634, 120053), "train": (11318, 59551), "test": (11316, 60502)},
        k_vals=(1, 10, 100, 1000),
        scores={"Recall @ 1": 0.772, "Recall @ 10": 0.894, "Recall @ 100": 0.956, "NMI": 0.900},
        ablations={
            "shared_num_classes": dict(
                zip(CLUSTERS, (0.728, 0.731, 0.730, 0.738, 0.741, 0.742, 0.740, 0.745, 0.744, 0.742))
            ),
            "cluster_update_freq": {"1": 0.741, "50": 0.730},
        },
    ),
    "in-shop": DatasetInfo(
        read=readers.read_in_shop,
        archive="In-shop Clothes Retrieval Benchmark",
        landmarks=("img", "Img/img"),
        layout="img/... or Img/img/..., and Eval/list_eval_partition.txt",
        url="http://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html",
        counts={"all": (7982, 52712), "train": (3997, 25882), "query": (3985, 14218), "gallery": (3985, 12612)},
        k_vals=(1, 10, 20, 30, 50),
        scores={"Recall @ 1": 0.882, "Recall @ 10": 0.970, "Recall @ 30": 0.980, "Recall @ 50": 0.988},
    ),
    "vehicle_id": DatasetInfo(
        read=readers.read_vehicle_id,
        archive="VehicleID_V1.0",
        landmarks=("image",),
        layout="image/<number>.jpg and train_test_split/train_list.txt, test_list_800.txt, ...",
        url="https://www.pkuml.org/resources/pku-vehicleid.html",
        counts={"train": (13164, 110178), "Set 1": (800, 6493), "Set 2": (1600, 13377), "Set 3": (2400, 19777)},
        k_vals=(1, 5),
        scores={
            "Set 1 Recall @ 1": 0.869, "Set 1 Recall @ 5": 0.934, "Set 3 Recall @ 1": 0.820, "Set 3 Recall @ 5": 0.910
        },
    ),
}  # fmt: skip
"""The published data sets, by name."""

CUSTOM = DatasetInfo(
    read=read_custom,
    landmarks=("images.csv", "images"),
    layout="images.csv, images/<class>/<image>, or train/<class>/<image> and test/<class>/<image>",
)
"""A user's own data set, which may have any other name."""


def dataset_info(name: str) -> DatasetInfo:
    """Return what is known of a data set; CUSTOM for names that are not published."""
    return PUBLISHED.get(name, CUSTOM)
