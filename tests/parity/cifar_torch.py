"""The CIFAR family in PyTorch, independent of xkd_jax, with RepDistiller's state-dict names.

Written from He et al. (arXiv:1512.03385), Zagoruyko and Komodakis (arXiv:1605.07146), Simonyan
and Zisserman (arXiv:1409.1556) and the layout of RepDistiller (arXiv:1910.10699, BSD-2).
`model(images)` with images [N, 3, H, W] returns logits and a dict of taps [N, C, h, w].
"""

from torch import nn
from torch.nn import functional as F


def conv(inputs, outputs, size, stride=1, bias=False):
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=bias)


class BasicBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs, 3), nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)
            )

    def forward(self, pre):
        """From one sum before its ReLU to the next."""
        x = F.relu(pre)
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut


class CifarResNet(nn.Module):
    def __init__(self, depth, channels, num_classes=100):
        super().__init__()
        self.conv1, self.bn1 = conv(3, channels[0], 3), nn.BatchNorm2d(channels[0])
        n = (depth - 2) // 6
        for i in range(3):
            inputs, outputs, stride = channels[i], channels[i + 1], 1 if i == 0 else 2
            blocks = [BasicBlock(inputs, outputs, stride)]
            blocks += [BasicBlock(outputs, outputs, 1) for _ in range(n - 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels[3], num_classes)

    def forward(self, x):
        x = self.bn1(self.conv1(x))
        pres = [x]
        for layer in (self.layer1, self.layer2, self.layer3):
            x = layer(x)
            pres.append(x)
        taps = {f"stage{i}_pre": pre for i, pre in enumerate(pres, start=1)}
        taps |= {f"stage{i}": F.relu(pre) for i, pre in enumerate(pres, start=1)}
        taps["pooled"] = taps["stage4"].mean((2, 3))
        taps["logits"] = self.fc(taps["pooled"])
        return taps["logits"], taps


class WideBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, outputs, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv(outputs, outputs, 3)
        self.convShortcut = None if inputs == outputs else conv(inputs, outputs, 1, stride)

    def forward(self, x):
        y = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(y)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(y))))


class WideGroup(nn.Module):
    def __init__(self, n, inputs, outputs, stride):
        super().__init__()
        blocks = [WideBlock(inputs, outputs, stride)]
        blocks += [WideBlock(outputs, outputs, 1) for _ in range(n - 1)]
        self.layer = nn.Sequential(*blocks)


class WideResNet(nn.Module):
    def __init__(self, depth, widen, num_classes=100):
        super().__init__()
        n, channels = (depth - 4) // 6, (16, 16 * widen, 32 * widen, 64 * widen)
        self.conv1 = conv(3, 16, 3)
        for i in range(3):
            group = WideGroup(n, channels[i], channels[i + 1], 1 if i == 0 else 2)
            setattr(self, f"block{i + 1}", group)
        self.bn1, self.fc = nn.BatchNorm2d(channels[3]), nn.Linear(channels[3], num_classes)

    def forward(self, x):
        taps = {}
        taps["stage1"] = x = self.conv1(x)
        for i, group in enumerate((self.block1, self.block2, self.block3), start=1):
            # The norm's second run is for the tap alone: in training it would move the
            # statistics twice.
            norm = group.layer[0].bn1
            taps[f"stage{i}_pre"] = F.batch_norm(
                x, *statistics(norm), norm.weight, norm.bias, training=self.training, eps=norm.eps
            )
            taps[f"stage{i + 1}"] = x = group.layer(x)
        taps["stage4_pre"] = x = self.bn1(x)
        taps["pooled"] = F.relu(x).mean((2, 3))
        taps["logits"] = self.fc(taps["pooled"])
        return taps["logits"], taps


def statistics(norm):
    return (None, None) if norm.training else (norm.running_mean, norm.running_var)


class CifarVGG(nn.Module):
    def __init__(self, channels, num_classes=100):
        super().__init__()
        inputs = 3
        for i, widths in enumerate(channels):
            layers = []
            for outputs in widths:
                layers += [conv(inputs, outputs, 3, bias=True), nn.BatchNorm2d(outputs), nn.ReLU()]
                inputs = outputs
            # The last ReLU is in `forward`.
            setattr(self, f"block{i}", nn.Sequential(*layers[:-1]))
        self.classifier = nn.Linear(inputs, num_classes)

    def forward(self, x):
        taps, height = {}, x.shape[2]
        x = F.relu(self.block0(x))
        for i in range(1, 5):
            if i < 4 or height == 64:
                x = F.max_pool2d(x, 2)
            taps[f"stage{i}_pre"] = x = getattr(self, f"block{i}")(x)
            taps[f"stage{i}"] = x = F.relu(x)
        taps["pooled"] = x.mean((2, 3))
        taps["logits"] = self.classifier(taps["pooled"])
        return taps["logits"], taps


def create(name, num_classes=100) -> nn.Module:
    """The network that RepDistiller calls `name`, with PyTorch's own initial weights."""
    if name.startswith("wrn_"):
        _, depth, widen = name.split("_")
        return WideResNet(int(depth), int(widen), num_classes)
    if name.startswith("vgg"):
        repeat = {"vgg8": 1, "vgg13": 2}[name]
        return CifarVGG([(width,) * repeat for width in (64, 128, 256, 512, 512)], num_classes)
    depth, _, wide = name.removeprefix("resnet").partition("x")
    channels = (32, 64, 128, 256) if wide else (16, 16, 32, 64)
    return CifarResNet(int(depth), channels, num_classes)
