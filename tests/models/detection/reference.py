"""Detection's operators in plain NumPy, one box at a time."""

import numpy as np


def iou(first, second):
    """Of a box with each of others [n, 4]."""
    sides = np.minimum(first[2:], second[:, 2:]) - np.maximum(first[:2], second[:, :2])
    shared = np.prod(np.maximum(sides, 0), 1)
    areas = [np.prod(box[..., 2:] - box[..., :2], -1) for box in (first, second)]
    return shared / (sum(areas) - shared)


def nms(boxes, scores, groups, threshold):
    """The indices of the boxes that greedy non-maximum suppression keeps, best first."""
    kept = []
    for i in np.argsort(-scores, kind="stable"):
        rivals = [j for j in kept if groups[j] == groups[i]]
        if not rivals or np.max(iou(boxes[i], boxes[rivals])) <= threshold:
            kept.append(int(i))
    return kept


def roi_align(features, box, scale, bins, samples=2):
    """The features [bins, bins, C] of `box` in `features` [h, w, C], with aligned=False.

    The rules of torchvision's C++ operator: samples more than one cell outside are 0.
    """
    height, width, channels = features.shape
    x1, y1, x2, y2 = box * scale
    step_y, step_x = max(y2 - y1, 1) / bins, max(x2 - x1, 1) / bins
    result = np.zeros((bins, bins, channels))
    for row, column, i, j in np.ndindex(bins, bins, samples, samples):
        y = y1 + (row + (i + 0.5) / samples) * step_y
        x = x1 + (column + (j + 0.5) / samples) * step_x
        if -1 <= y <= height and -1 <= x <= width:
            result[row, column] += bilinear(features, y, x) / samples**2
    return result


def bilinear(features, y, x):
    height, width, _ = features.shape
    y, x = np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - top, x - left
    above = (1 - dx) * features[top, left] + dx * features[top, right]
    below = (1 - dx) * features[bottom, left] + dx * features[bottom, right]
    return (1 - dy) * above + dy * below


def random_boxes(rng, count, side, smallest=2.0):
    """Boxes float32 [count, 4] inside a square of `side` pixels."""
    corners = rng.uniform(0, side - smallest, (count, 2))
    sizes = rng.uniform(smallest, side - corners)
    return np.concatenate([corners, corners + sizes], 1).astype(np.float32)
