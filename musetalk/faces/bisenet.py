"""BiSeNet face parsing: the network whose published checkpoint is 79999_iter.pth, and its label maps.

Bilateral segmentation network (Yu et al. 2018) on ResNet-18, 19 classes of CelebAMask-HQ. Attribute
names are the checkpoint's keys; the two auxiliary heads serve training only and are kept so that the
checkpoint fits as a whole. This module imports torch at its top and is imported only where it is used.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from musetalk.checkpoints import load_strictly, read_tensors
from musetalk.faces.base import Face
from musetalk.faces.labels import CLASS_COUNT, LABEL_SIDE
from musetalk.geometry import Box, crop_frame

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB, of 0 to 1
IMAGENET_STD = (0.229, 0.224, 0.225)


class ConvBatchNorm(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, padding: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H, W)."""
        return functional.relu(self.bn(self.conv(x)))


class BasicBlock(nn.Module):
    """ResNet's block of two 3 × 3 convolutions (He et al. 2015)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential() if stride == 1 else _projection(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        residual = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.downsample(x) + self.bn2(self.conv2(residual)))


def _projection(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ResNet18(nn.Module):
    """The backbone; gives its features at 1/8, 1/16 and 1/32."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(BasicBlock(64, 64, 1), BasicBlock(64, 64, 1))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, 2), BasicBlock(128, 128, 1))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, 2), BasicBlock(256, 256, 1))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, 2), BasicBlock(512, 512, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, H, W) to channels 128, 256, 512."""
        x = functional.max_pool2d(functional.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        eighth = self.layer2(self.layer1(x))
        sixteenth = self.layer3(eighth)
        return eighth, sixteenth, self.layer4(sixteenth)


class AttentionRefinement(nn.Module):
    """Weighs its features' channels by their global mean."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.conv = ConvBatchNorm(inputs, 128)
        self.conv_atten = nn.Conv2d(128, 128, 1, bias=False)
        self.bn_atten = nn.BatchNorm2d(128)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, 128, H, W)."""
        features = self.conv(x)
        pooled = functional.adaptive_avg_pool2d(features, 1)
        return features * torch.sigmoid(self.bn_atten(self.conv_atten(pooled)))


class ContextPath(nn.Module):
    """Brings the backbone's coarse features back to 1/8."""

    def __init__(self) -> None:
        super().__init__()
        self.resnet = ResNet18()
        self.arm16 = AttentionRefinement(256)
        self.arm32 = AttentionRefinement(512)
        self.conv_head32 = ConvBatchNorm(128, 128)
        self.conv_head16 = ConvBatchNorm(128, 128)
        self.conv_avg = ConvBatchNorm(512, 128, 1, 0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) to the backbone's and the context's features at 1/8, 128 channels each."""
        eighth, sixteenth, coarsest = self.resnet(x)
        average = self.conv_avg(functional.adaptive_avg_pool2d(coarsest, 1))
        context = self.arm32(coarsest) + average
        context = self.conv_head32(functional.interpolate(context, sixteenth.shape[2:]))
        context = self.arm16(sixteenth) + context
        return eighth, self.conv_head16(functional.interpolate(context, eighth.shape[2:]))


class FeatureFusion(nn.Module):
    """Joins spatial and context features and weighs them by their global mean."""

    def __init__(self) -> None:
        super().__init__()
        self.convblk = ConvBatchNorm(256, 256, 1, 0)
        self.conv1 = nn.Conv2d(256, 64, 1, bias=False)
        self.conv2 = nn.Conv2d(64, 256, 1, bias=False)

    def forward(self, spatial: Tensor, context: Tensor) -> Tensor:
        """Twice (B, 128, H, W) to (B, 256, H, W)."""
        features = self.convblk(torch.cat([spatial, context], dim=1))
        attention = self.conv1(functional.adaptive_avg_pool2d(features, 1))
        return features + features * torch.sigmoid(self.conv2(functional.relu(attention)))


class ClassHead(nn.Module):
    """One score per class and pixel."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.conv = ConvBatchNorm(inputs, hidden)
        self.conv_out = nn.Conv2d(hidden, CLASS_COUNT, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, 19, H, W)."""
        return self.conv_out(self.conv(x))


class BiSeNet(nn.Module):
    """Scores of the 19 classes for every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.cp = ContextPath()
        self.ffm = FeatureFusion()
        self.conv_out = ClassHead(256, 256)
        self.conv_out16 = ClassHead(128, 64)
        self.conv_out32 = ClassHead(128, 64)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float RGB, ImageNet-normalised, sides multiples of 8, to logits (B, 19, H, W)."""
        spatial, context = self.cp(images)
        scores = self.conv_out(self.ffm(spatial, context))
        return functional.interpolate(scores, images.shape[2:], mode="bilinear", align_corners=True)


def load_bisenet(path: Path, device: str) -> BiSeNet:
    """The network with the weights of `path`, ready to run.

    Raises:
        WeightsError: the file is missing, damaged or of another network.
    """
    network = BiSeNet()
    load_strictly(network, read_tensors(path), path)
    return network.to(device).eval().requires_grad_(False)


def parse(network: BiSeNet, image: np.ndarray) -> np.ndarray:
    """Logits (19, H, W) float32 of `image` (H, W, 3) uint8 RGB."""
    device = next(network.parameters()).device
    pixels = torch.from_numpy(image.astype(np.float32) / 255).permute(2, 0, 1)[None].to(device)
    mean, std = (
        torch.tensor(values, device=device)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    with torch.inference_mode():
        return network((pixels - mean) / std)[0].cpu().numpy()


class BisenetLabelMapper:
    """Parses the crop box as the reference does.

    Raises:
        WeightsError: the weights are missing, damaged or of another network.
    """

    name = "bisenet"

    def __init__(self, weights: Path, device: str) -> None:
        self._network = load_bisenet(weights, device)

    def label_map(self, frame: np.ndarray, face: Face, crop: Box) -> np.ndarray:
        """(512, 512) uint8 classes of `crop`."""
        from PIL import Image

        rgb = Image.fromarray(np.ascontiguousarray(crop_frame(frame, crop)[:, :, ::-1]))
        resized = np.asarray(rgb.resize((LABEL_SIDE, LABEL_SIDE), Image.Resampling.BILINEAR))
        return parse(self._network, resized).argmax(axis=0).astype(np.uint8)
