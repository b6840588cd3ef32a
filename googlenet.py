"""GoogLeNet (Inception v1) as a backbone, on torchvision's implementation."""

import torch
import torchvision
from torch import Tensor, nn


class GoogLeNet(nn.Module):
    """torchvision's GoogLeNet as a backbone, with BatchNorm and without the auxiliary classifiers.

    It maps (B, 3, H, W) images, normalised as for ImageNet, to (B, 1024) pooled features.

    torchvision's weights were ported from a network that took images in [-1, 1]. So images are first rescaled to that
    range, whatever the weights, as torchvision's `transform_input` does. The dropout before torchvision's classifier is
    left out, because it would add noise to the distances between embeddings of a batch.

    Random weights follow He et al. 2015. torchvision's own, with a standard deviation of 0.01, make the output vanish
    until BatchNorm has seen data, so that all embeddings would coincide before training.

    Reference:
        Szegedy et al., "Going Deeper with Convolutions", CVPR 2015.
    """

    out_features = 1024
    weights = torchvision.models.GoogLeNet_Weights.IMAGENET1K_V1
    unused_weights = ("fc.", "aux1.", "aux2.")

    def __init__(self):
        super().__init__()
        self.layers = torchvision.models.googlenet(weights=None, aux_logits=False, init_weights=False)
        self.layers.fc = self.layers.dropout = nn.Identity()
        for module in self.layers.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        self.register_buffer("input_scale", (std / 0.5).view(3, 1, 1), persistent=False)
        self.register_buffer("input_shift", ((mean - 0.5) / 0.5).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor, with_pooled: bool = True) -> tuple[Tensor, Tensor | None]:
        """Return early maps and pooled features of normalised images.

        Args:
            images: (B, 3, H, W), normalised as for ImageNet.
            with_pooled: whether to compute the pooled features.

        Returns:
            The output of conv3, the last layer before the inception blocks, (B, 192, H/4, W/4), and the globally
            average-pooled output of the last inception block, (B, 1024), or None without with_pooled.
        """
        net = self.layers
        images = images * self.input_scale + self.input_shift
        early_maps = net.conv3(net.conv2(net.maxpool1(net.conv1(images))))
        if not with_pooled:
            return early_maps, None
        maps = net.inception3b(net.inception3a(net.maxpool2(early_maps)))
        maps = net.inception4b(net.inception4a(net.maxpool3(maps)))
        maps = net.inception4e(net.inception4d(net.inception4c(maps)))
        maps = net.inception5b(net.inception5a(net.maxpool4(maps)))
        return early_maps, torch.flatten(net.avgpool(maps), 1)
