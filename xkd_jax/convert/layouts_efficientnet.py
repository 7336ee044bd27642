"""Other libraries' names for the tensors of EfficientNets and MobileNets."""

from xkd_jax.augment.normalization import IMAGENET_MEAN, IMAGENET_STD
from xkd_jax.convert.layout import Layout


def _number(*depths: int, start: int = 0) -> list[tuple[int, int, int]]:
    """(n, stage, index) of each block, where others only count them: n is `start` for the first."""
    places = [(stage, i) for stage, depth in enumerate(depths) for i in range(depth)]
    return [(n, stage, i) for n, (stage, i) in enumerate(places, start)]


# By a block that only networks of at least that depth have; the deepest comes first.
_EFFICIENTNET_BLOCKS = {
    25: _number(2, 3, 3, 5, 5, 6, 2),  # B3
    22: _number(2, 3, 3, 4, 4, 5, 2),  # B1, B2
    15: _number(1, 2, 2, 3, 3, 4, 1),  # B0, Lite0
}
# As in TensorFlow, where these weights are from.
_TENSORFLOW = {"padding": "SAME", "bn_epsilon": 1e-3}


def _efficientnet_pytorch(last: int) -> Layout:
    """efficientnet-pytorch's names for the networks with the block `last`."""
    blocks = _EFFICIENTNET_BLOCKS[last]
    first = "|".join(str(n) for n, stage, _ in blocks if stage == 0)  # without expansion
    return Layout(
        "efficientnet-pytorch's",
        rf"_blocks\.{last}\._depthwise_conv\.weight",
        (
            (r"^_conv_(stem|head)", r"conv_\1"),
            (r"^_bn1", "bn2"),
            (r"^_bn0", "bn1"),
            (r"^_fc", "classifier"),
            (rf"^(_blocks\.({first})\.)_project_conv", r"\1conv_pw"),
            (rf"^(_blocks\.({first})\.)_(bn[12])", r"\1\3"),
            (r"\._expand_conv", ".conv_pw"),
            (r"\._depthwise_conv", ".conv_dw"),
            (r"\._project_conv", ".conv_pwl"),
            (r"\._se_(reduce|expand)", r".se.conv_\1"),
            (r"\._bn2", ".bn3"),
            (r"\._bn1", ".bn2"),
            (r"\._bn0", ".bn1"),
            *((rf"^_blocks\.{n}\.", f"blocks.{i}.{j}.") for n, i, j in blocks),
        ),
        args=_TENSORFLOW,
    )


def _hugging_face(last: int) -> Layout:
    """Hugging Face's names for the networks with the block `last`."""
    blocks = _EFFICIENTNET_BLOCKS[last]
    first = rf"^(encoder\.blocks\.({'|'.join(str(n) for n, stage, _ in blocks if stage == 0)})\.)"
    return Layout(
        "Hugging Face's",
        rf"(efficientnet\.)?encoder\.blocks\.{last}\.depthwise_conv\.depthwise_conv\.weight",
        (
            (r"^efficientnet\.", ""),
            (r"^embeddings\.convolution\.", "conv_stem."),
            (r"^embeddings\.batchnorm\.", "bn1."),
            (r"^encoder\.top_conv\.", "conv_head."),
            (r"^encoder\.top_bn\.", "bn2."),
            (rf"{first}depthwise_conv\.depthwise_norm\.", r"\1bn1."),
            (rf"{first}projection\.project_conv\.", r"\1conv_pw."),
            (rf"{first}projection\.project_bn\.", r"\1bn2."),
            (r"\.expansion\.expand_conv\.", ".conv_pw."),
            (r"\.expansion\.expand_bn\.", ".bn1."),
            (r"\.depthwise_conv\.depthwise_conv\.", ".conv_dw."),
            (r"\.depthwise_conv\.depthwise_norm\.", ".bn2."),
            (r"\.squeeze_excite\.(reduce|expand)\.", r".se.conv_\1."),
            (r"\.projection\.project_conv\.", ".conv_pwl."),
            (r"\.projection\.project_bn\.", ".bn3."),
            *((rf"^encoder\.blocks\.{n}\.", f"blocks.{i}.{j}.") for n, i, j in blocks),
        ),
        args=_TENSORFLOW,
    )


_TORCHVISION_MOBILENETV2 = Layout(
    "torchvision's",
    r"features\.1\.conv\.0\.0\.weight",
    (
        (r"^features\.0\.0\.", "conv_stem."),
        (r"^features\.0\.1\.", "bn1."),
        (r"^features\.18\.0\.", "conv_head."),
        (r"^features\.18\.1\.", "bn2."),
        (r"^classifier\.1\.", "classifier."),
        (r"^features\.1\.conv\.0\.0\.", "blocks.0.0.conv_dw."),
        (r"^features\.1\.conv\.0\.1\.", "blocks.0.0.bn1."),
        (r"^features\.1\.conv\.1\.", "blocks.0.0.conv_pw."),
        (r"^features\.1\.conv\.2\.", "blocks.0.0.bn2."),
        *(
            (rf"^features\.{n}\.conv\.", f"blocks.{i}.{j}.conv.")
            for n, i, j in _number(1, 2, 3, 4, 3, 3, 1, start=1)
        ),
        (r"\.conv\.0\.0\.", ".conv_pw."),
        (r"\.conv\.0\.1\.", ".bn1."),
        (r"\.conv\.1\.0\.", ".conv_dw."),
        (r"\.conv\.1\.1\.", ".bn2."),
        (r"\.conv\.2\.", ".conv_pwl."),
        (r"\.conv\.3\.", ".bn3."),
    ),
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
)

# An inverted residual, without squeeze-excite or with it.
_TORCHVISION_BLOCK = (
    (r"\.block\.[12]\.fc1\.", ".block.se.conv_reduce."),
    (r"\.block\.[12]\.fc2\.", ".block.se.conv_expand."),
    (r"\.block\.0\.0\.", ".block.conv_pw."),
    (r"\.block\.0\.1\.", ".block.bn1."),
    (r"\.block\.1\.0\.", ".block.conv_dw."),
    (r"\.block\.1\.1\.", ".block.bn2."),
    (r"\.block\.[23]\.0\.", ".block.conv_pwl."),
    (r"\.block\.[23]\.1\.", ".block.bn3."),
)

_TORCHVISION_EFFICIENTNET = Layout(
    "torchvision's",
    r"features\.1\.0\.block\.1\.fc1\.weight",
    (
        (r"^features\.0\.0\.", "conv_stem."),
        (r"^features\.0\.1\.", "bn1."),
        (r"^features\.8\.0\.", "conv_head."),
        (r"^features\.8\.1\.", "bn2."),
        (r"^classifier\.1\.", "classifier."),
        (r"^features\.1\.(\d+)\.block\.0\.0\.", r"blocks.0.\1.conv_dw."),
        (r"^features\.1\.(\d+)\.block\.0\.1\.", r"blocks.0.\1.bn1."),
        (r"^features\.1\.(\d+)\.block\.2\.0\.", r"blocks.0.\1.conv_pw."),
        (r"^features\.1\.(\d+)\.block\.2\.1\.", r"blocks.0.\1.bn2."),
        *_TORCHVISION_BLOCK,
        *((rf"^features\.{i + 1}\.(\d+)\.block\.", rf"blocks.{i}.\1.") for i in range(7)),
    ),
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
)

_TORCHVISION_EFFICIENTNETV2 = Layout(
    "torchvision's",
    r"features\.7\.0\.weight",
    (
        (r"^features\.0\.0\.", "conv_stem."),
        (r"^features\.0\.1\.", "bn1."),
        (r"^features\.7\.0\.", "conv_head."),
        (r"^features\.7\.1\.", "bn2."),
        (r"^classifier\.1\.", "classifier."),
        (r"^features\.1\.(\d+)\.block\.0\.0\.", r"blocks.0.\1.conv."),
        (r"^features\.1\.(\d+)\.block\.0\.1\.", r"blocks.0.\1.bn1."),
        (r"^(features\.[23]\.\d+\.)block\.0\.0\.", r"\1block.conv_exp."),
        (r"^(features\.[23]\.\d+\.)block\.1\.0\.", r"\1block.conv_pwl."),
        (r"^(features\.[23]\.\d+\.)block\.1\.1\.", r"\1block.bn2."),
        *_TORCHVISION_BLOCK,
        *((rf"^features\.{i + 1}\.(\d+)\.block\.", rf"blocks.{i}.\1.") for i in range(6)),
    ),
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    args={"padding": None, "bn_epsilon": 1e-3},
)


def _torchvision_mobilenetv3(marker: str, project: int, *depths: int) -> Layout:
    """A MobileNetV3 whose first block projects in its layer `project`, with `depths` per stage."""
    last, stages = sum(depths) + 1, len(depths)
    return Layout(
        "torchvision's",
        marker,
        (
            (r"^features\.0\.0\.", "conv_stem."),
            (r"^features\.0\.1\.", "bn1."),
            (rf"^features\.{last}\.0\.", f"blocks.{stages}.0.conv."),
            (rf"^features\.{last}\.1\.", f"blocks.{stages}.0.bn1."),
            (r"^classifier\.0\.", "conv_head."),
            (r"^classifier\.3\.", "classifier."),
            (r"^features\.1\.block\.0\.0\.", "blocks.0.0.conv_dw."),
            (r"^features\.1\.block\.0\.1\.", "blocks.0.0.bn1."),
            (rf"^features\.1\.block\.{project}\.0\.", "blocks.0.0.conv_pw."),
            (rf"^features\.1\.block\.{project}\.1\.", "blocks.0.0.bn2."),
            *_TORCHVISION_BLOCK,
            *(
                (rf"^features\.{n}\.block\.", f"blocks.{i}.{j}.")
                for n, i, j in _number(*depths, start=1)
            ),
        ),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        args={"bn_epsilon": 1e-3},
    )


EFFICIENTNETS = (
    *(_efficientnet_pytorch(last) for last in _EFFICIENTNET_BLOCKS),
    *(_hugging_face(last) for last in _EFFICIENTNET_BLOCKS),
    _TORCHVISION_MOBILENETV2,
    _TORCHVISION_EFFICIENTNET,
    _TORCHVISION_EFFICIENTNETV2,
    _torchvision_mobilenetv3(r"features\.1\.block\.1\.fc1\.weight", 2, 1, 2, 3, 2, 3),
    _torchvision_mobilenetv3(r"features\.1\.block\.1\.0\.weight", 1, 1, 2, 3, 4, 2, 3),
)
