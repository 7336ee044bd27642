"""Translates a detector to ONNX: `Detector.__call__` on one image, without static shapes.

JAX's detector pads boxes to fixed numbers, in a loop of its own for the non-maximum suppression.
ONNX has that as an operator and counts what is left in every image, so that only the backbone is
translated from what JAX traces; what follows is written here, operator by operator.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from onnx import helper  # pyright: ignore[reportMissingImports]

from xkd_jax import backend
from xkd_jax.export.onnx_graph import Graph, Node
from xkd_jax.export.student import normalized
from xkd_jax.methods.base import apply
from xkd_jax.model import Model
from xkd_jax.models.detection import anchors as layout
from xkd_jax.models.detection import boxes as box_ops
from xkd_jax.models.detection import detections, heads, roi_align, rpn

# One array of the graph: its name, or a constant.
_Value = str | np.ndarray | np.float32
_FLAT = np.array([-1])
_END = np.array([np.iinfo(np.int64).max])


class Level(NamedTuple):
    """A level of the pyramid: its features, [1, C, h, w], h and w."""

    features: str
    grid: tuple[int, int]


def detect(graph: Graph, model: Model, images: jax.ShapeDtypeStruct) -> dict[str, str]:
    """Adds a detector of `images` and `sizes` [1, 2], heights and widths without padding.

    Args:
      graph: empty.
      model: a detector with its weights.
      images: the input, [1, S, S, 3].

    Returns:
      the names of `boxes` [D, 4], `scores` [D], `classes` int64 [D] and, with a mask head, `masks`
      [D, 28, 28], which are those of `Detections` without its padding.

    Raises:
      UserError: as for `write_onnx`, of the backbone.
    """
    return _Detector(graph, model, images.shape[1]).find(images)


class _Operators:
    """Adds operators to a graph, whose arrays are in ONNX's order."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self._constants: dict[tuple[Any, ...], str] = {}

    def __call__(self, kind: str, *inputs: _Value, **attributes: Any) -> str:
        """Adds an operator with one output and returns its name."""
        return self.several(kind, 1, *inputs, **attributes)[0]

    def several(self, kind: str, count: int, *inputs: _Value, **attributes: Any) -> list[str]:
        """Adds an operator with `count` outputs and returns their names."""
        names = [x if isinstance(x, str) else self._constant(x) for x in inputs]
        name = f"{kind.lower()}_{len(self.graph.nodes)}"
        outputs = [name, *(f"{name}_{i}" for i in range(1, count))]
        self.graph.nodes.append(helper.make_node(kind, names, outputs, name=name, **attributes))
        return outputs

    def _constant(self, array: np.ndarray | np.float32) -> str:
        """The name of a constant; all levels share the weights of the proposals, for one."""
        array = np.ascontiguousarray(array)
        key = array.dtype, array.shape, hashlib.sha256(array.tobytes()).digest()
        if key not in self._constants:
            self._constants[key] = self.graph.constant(array)
        return self._constants[key]

    def conv(self, x: str, params: Any, padding: int = 0) -> str:
        """A convolution of `x` [N, C, h, w] with stride 1."""
        kernel = np.asarray(params["kernel"]).transpose(3, 2, 0, 1)
        return self("Conv", x, kernel, np.asarray(params["bias"]), pads=[padding] * 4)

    def dense(self, x: str, params: Any) -> str:
        """A linear layer of `x` [N, C]."""
        return self("Gemm", x, *(np.asarray(params[name]) for name in ("kernel", "bias")))

    def halves(self, x: _Value) -> list[str]:
        """The two halves of the last axis, of length 4: of boxes, the two corners."""
        return self.several("Split", 2, x, np.array([2, 2]), axis=-1)

    def sides(self, boxes: str) -> str:
        """Width and height [..., 2] of `boxes` [..., 4]."""
        low, high = self.halves(boxes)
        return self("Sub", high, low)

    def decode(self, deltas: str, references: str, weights: box_ops.Weights) -> str:
        """`boxes.decode`."""
        low, high = self.halves(references)
        size = self("Sub", high, low)
        centre = self("Add", low, self("Mul", size, np.float32(0.5)))
        shift, growth = self.halves(self("Div", deltas, np.array(weights, np.float32)))
        centre = self("Add", self("Mul", shift, size), centre)
        growth = self("Exp", self("Min", growth, np.float32(box_ops.MAX_GROWTH)))
        half = self("Mul", self("Mul", growth, np.float32(0.5)), size)
        return self("Concat", self("Sub", centre, half), self("Add", centre, half), axis=-1)

    def clip(self, boxes: str, limits: str) -> str:
        """The parts of `boxes` [..., 4] from 0 to `limits`, [4]."""
        return self("Max", self("Min", boxes, limits), np.float32(0))

    def is_large(self, boxes: str, min_size: float) -> str:
        """`boxes.is_large`."""
        shorter = self("ReduceMin", self.sides(boxes), axes=[-1], keepdims=0)
        return self("GreaterOrEqual", shorter, np.float32(min_size))

    def best(self, scores: str, most: int) -> list[str]:
        """The values and indices of up to `most` of `scores` [n], the best first."""
        count = self("Min", self("Shape", scores), np.array([most]))
        return self.several("TopK", 2, scores, count, axis=0)

    def column(self, selected: str, index: int) -> str:
        """A column [n] of the triples that NonMaxSuppression returns, [n, 3]."""
        return self("Reshape", self("Gather", selected, np.array([index]), axis=1), _FLAT)


class _Detector:
    """Writes the parts of a detector whose input has `side` x `side` pixels."""

    def __init__(self, graph: Graph, model: Model, side: int):
        self._op = _Operators(graph)
        self._model = model
        self._module: Any = model.module
        self._side = side
        self._params = model.variables["params"]

    def find(self, images: jax.ShapeDtypeStruct) -> dict[str, str]:
        """The outputs of `detect`."""
        op = self._op
        levels = self._pyramid(images)
        # Width and height twice, the order of a box.
        limits = op("Gather", op("Reshape", "sizes", np.array([2])), np.array([1, 0, 1, 0]))
        proposals = self._propose(levels, limits)
        found = self._select(levels, proposals, limits)
        if self._module.mask:
            found["masks"] = self._segment(levels, found["boxes"], found["classes"])
        return found

    def _pyramid(self, images: jax.ShapeDtypeStruct) -> list[Level]:
        """`fpn.Backbone`."""
        op, params = self._op, self._params["backbone"]["fpn"]
        stages = self._stages(images)
        levels: list[Level] = []
        above = ""
        for i in reversed(range(len(stages))):
            grid = stages[i].shape[1:3]
            lateral = op.conv(op.graph.name(stages[i]), params[f"inner_blocks_{i}_0"])
            if above:
                sizes = np.array([1, params[f"inner_blocks_{i}_0"]["bias"].size, *grid])
                how = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
                lateral = op("Add", lateral, op("Resize", above, "", "", sizes, **how))
            above = lateral
            features = op.conv(above, params[f"layer_blocks_{i}_0"], 1)
            levels.insert(0, Level(features, (grid[0], grid[1])))
        rows, columns = levels[-1].grid
        last = op("MaxPool", levels[-1].features, kernel_shape=[1, 1], strides=[2, 2])
        return [*levels, Level(last, (-(-rows // 2), -(-columns // 2)))]

    def _stages(self, images: jax.ShapeDtypeStruct) -> list[Node]:
        body = self._module.backbone.body
        variables = {
            name: collection["backbone"]["body"]
            for name, collection in self._model.variables.items()
        }

        def forward(images: jax.Array) -> list[jax.Array]:
            _, out = apply(body, variables, normalized(self._model, images), train=False)
            return [out[f"stage{i}"] for i in range(1, 5)]

        with backend.assume("gpu"):  # where convolutions are not rewritten as on a CPU
            jaxpr = jax.make_jaxpr(forward)(images)
        found = self._op.graph.trace(jaxpr, [Node("images", images.shape)])
        return [stage for stage in found if isinstance(stage, Node)]

    def _propose(self, levels: Sequence[Level], limits: str) -> str:
        """`rpn.propose`: the boxes [R, 4] of up to `rpn_post_nms_test` regions."""
        op, module = self._op, self._module
        anchors = layout.make_anchors(
            (self._side, self._side),
            [level.grid for level in levels],
            module.anchor_sizes,
            module.aspect_ratios,
        )
        boxes, scores = zip(
            *(self._candidates(*pair, limits) for pair in zip(levels, anchors, strict=True)),
            strict=True,
        )
        _, best = op.best(op("Concat", *scores, axis=0), module.rpn_post_nms_test)
        return op("Gather", op("Concat", *boxes, axis=0), best)

    def _candidates(self, level: Level, anchors: np.ndarray, limits: str) -> tuple[str, str]:
        """The boxes [n, 4] of a level that the suppression keeps, and their scores [n]."""
        op, module, params = self._op, self._module, self._params["rpn"]["head"]
        hidden = op("Relu", op.conv(level.features, params["conv_0_0"], 1))

        def rows(name: str, *shape: int) -> str:  # by position, then by anchor
            found = op("Transpose", op.conv(hidden, params[name]), perm=[0, 2, 3, 1])
            return op("Reshape", found, np.array(shape))

        deltas = rows("bbox_pred", -1, 4)
        # `anchors.inside`: whether an anchor's centre lies above and left of the image's end.
        ends = op("Mul", op("Ceil", op("Div", limits, np.float32(layout.MULTIPLE))),
                  np.float32(layout.MULTIPLE))  # fmt: skip
        centres = np.tile((anchors[:, :2] + anchors[:, 2:]) / 2, 2)
        margin = op("ReduceMin", op("Sub", ends, centres), axes=[-1], keepdims=0)
        inside = op("Greater", margin, np.float32(0))
        logits = op("Where", inside, rows("cls_logits", -1), np.float32(-np.inf))
        logits, index = op.best(logits, module.rpn_pre_nms_test)
        boxes = op.decode(op("Gather", deltas, index), op("Gather", anchors, index), rpn.WEIGHTS)
        boxes = op.clip(boxes, limits)
        kept = op("And", op.is_large(boxes, rpn.MIN_SIZE),
                  op("Greater", logits, np.float32(-np.inf)))  # fmt: skip
        boxes = op("Compress", boxes, kept, axis=0)
        scores = op("Compress", op("Sigmoid", logits), kept, axis=0)
        selected = op(
            "NonMaxSuppression",
            op("Unsqueeze", boxes, np.array([0])),
            op("Unsqueeze", scores, np.array([0, 1])),
            np.array([module.rpn_post_nms_test]),
            np.array([module.rpn_nms], np.float32),
        )
        index = op.column(selected, 2)
        return op("Gather", boxes, index), op("Gather", scores, index)

    def _select(self, levels: Sequence[Level], proposals: str, limits: str) -> dict[str, str]:
        """`detections.select`: the best boxes, scores and classes."""
        op, module, params = self._op, self._module, self._params["roi_heads"]
        x = op("Flatten", self._roi_align(levels, proposals, heads.BOX_BINS))
        for name in ("fc6", "fc7"):
            x = op("Relu", op.dense(x, params["box_head"][name]))
        scores = op("Softmax", op.dense(x, params["box_predictor"]["cls_score"]), axis=1)
        deltas = op.dense(x, params["box_predictor"]["bbox_pred"])
        deltas = op("Reshape", deltas, np.array([-1, module.num_classes + 1, 4]))
        scores, deltas = (  # without the background
            op("Slice", value, np.array([1]), _END, np.array([1])) for value in (scores, deltas)
        )
        boxes = op.decode(deltas, op("Unsqueeze", proposals, np.array([1])), detections.WEIGHTS)
        boxes = op.clip(boxes, limits)
        large = op.is_large(boxes, detections.MIN_SIZE)
        scores = op("Where", large, scores, np.float32(0))
        # Every class has boxes of its own, which for the operator are those of another image.
        boxes = op("Transpose", boxes, perm=[1, 0, 2])
        scores = op("Unsqueeze", op("Transpose", scores, perm=[1, 0]), np.array([1]))
        selected = op(
            "NonMaxSuppression",
            boxes,
            scores,
            np.array([module.max_detections]),
            np.array([module.box_nms], np.float32),
            np.array([module.min_score], np.float32),
        )
        scores, best = op.best(op("GatherND", scores, selected), module.max_detections)
        selected = op("Gather", selected, best)
        places = op("Gather", selected, np.array([0, 2]), axis=1)
        classes = op("Add", op.column(selected, 0), np.array(1))
        return {"boxes": op("GatherND", boxes, places), "scores": scores, "classes": classes}

    def _segment(self, levels: Sequence[Level], boxes: str, classes: str) -> str:
        """The masks [D, 28, 28] in `boxes` [D, 4], of their `classes` [D]."""
        op, params = self._op, self._params["roi_heads"]
        x = self._roi_align(levels, boxes, heads.MASK_BINS)
        for name in sorted(params["mask_head"]):
            x = op("Relu", op.conv(x, params["mask_head"][name], 1))
        predictor = params["mask_predictor"]
        kernel = np.asarray(predictor["conv5_mask"]["kernel"]).transpose(3, 2, 0, 1)
        bias = np.asarray(predictor["conv5_mask"]["bias"])
        x = op("Relu", op("ConvTranspose", x, kernel, bias, strides=[2, 2]))
        logits = op.conv(x, predictor["mask_fcn_logits"])
        which = op("Unsqueeze", classes, np.array([1]))
        return op("Sigmoid", op("GatherND", logits, which, batch_dims=1))

    def _roi_align(self, levels: Sequence[Level], boxes: str, bins: int) -> str:
        """`roi_align.roi_align`: [R, C, bins, bins] of `boxes` [R, 4]."""
        op, levels = self._op, levels[:-1]
        strides = [self._side // level.grid[0] for level in levels]
        area = op("ReduceProd", op.sides(boxes), axes=[-1], keepdims=0)
        side = op("Sqrt", op("Max", area, np.float32(0)))
        relative = op("Log", op("Div", side, np.float32(roi_align.CANONICAL_SIDE)))
        exponent = op("Div", relative, np.float32(math.log(2)))
        exponent = op("Add", exponent, np.float32(roi_align.CANONICAL_LEVEL))
        exponent = op("Floor", op("Add", exponent, np.float32(roi_align.EPSILON)))
        first, last = (np.float32(round(math.log2(strides[i]))) for i in (0, -1))
        which = op("Clip", exponent, first, last)
        parts, places = [], []
        for i, (level, stride) in enumerate(zip(levels, strides, strict=True)):
            place = op("NonZero", op("Equal", which, np.float32(first + i)))
            place = op("Reshape", place, _FLAT)
            part = op(
                "RoiAlign",
                level.features,
                op("Gather", boxes, place),
                op("Sub", place, place),  # the only image
                output_height=bins,
                output_width=bins,
                sampling_ratio=roi_align.SAMPLES,
                spatial_scale=1 / stride,
            )
            parts.append(part)
            places.append(place)
        places = op("Concat", *places, axis=0)
        _, order = op.several("TopK", 2, places, op("Shape", places), axis=0, largest=0)
        return op("Gather", op("Concat", *parts, axis=0), order)
