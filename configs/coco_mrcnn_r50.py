"""COCO: a Mask R-CNN on a ResNet-50, with the recipe of coco_frcnn_r50.py, which has more to say.

Claim: none yet; the full schedule has not been run with this code. torchvision's reference reaches
box AP 37.9 and mask AP 34.6 with the schedule of `:2x`, and the paper's Table 4 has a mask AP of
32.6.
Cost: as coco_frcnn_r50.py, and the mask head. `:smoke` takes about a minute on two CPU cores.
Command:
  python -m xkd_jax.main --config configs/coco_mrcnn_r50.py --config.data.name=coco:DIR \
    --workdir runs/coco_mrcnn_r50
"""

from xkd_jax.config import Config
from xkd_jax.configs import coco_frcnn_r50


def get_config(variant: str = "") -> Config:
    config = coco_frcnn_r50.get_config(variant)
    config.student.model = "maskrcnn_resnet50_fpn"
    return config
