"""Mean and standard deviation per channel (RGB, pixels in [0, 1]) that images are normalised with.

For data sets and for networks; imports nothing, because data/ works without JAX.
"""

Statistics = tuple[float, float, float]

# The constants of timm and torchvision.
IMAGENET_MEAN: Statistics = (0.485, 0.456, 0.406)
IMAGENET_STD: Statistics = (0.229, 0.224, 0.225)
# Google's preprocessing, to [-1, 1]: Inception, Xception and the ViTs of the original authors.
HALF_MEAN: Statistics = (0.5, 0.5, 0.5)
HALF_STD: Statistics = (0.5, 0.5, 0.5)
# CLIP's (arXiv:2103.00020), of OpenAI and OpenCLIP.
CLIP_MEAN: Statistics = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Statistics = (0.26862954, 0.26130258, 0.27577711)

# Over all pixels of the training images, to four digits.
CIFAR10_MEAN: Statistics = (0.4914, 0.4822, 0.4465)
CIFAR10_STD: Statistics = (0.2470, 0.2435, 0.2616)
# Computed from TFDS's 50,000 images. RepDistiller's constants, (0.5071, 0.4867, 0.4408) and
# (0.2675, 0.2565, 0.2761), differ by at most 2e-4.
CIFAR100_MEAN: Statistics = (0.5071, 0.4865, 0.4409)
CIFAR100_STD: Statistics = (0.2673, 0.2564, 0.2762)
FASHION_MNIST_MEAN: Statistics = (0.2860, 0.2860, 0.2860)
FASHION_MNIST_STD: Statistics = (0.3530, 0.3530, 0.3530)
