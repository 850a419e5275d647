"""Installs the package `sam3` and the stages' folders; see README.md for the extras."""

from setuptools import setup

# Folder of each package; `sam3` lives one level down so that `PYTHONPATH=sam3` finds it too.
PACKAGES = {
    "sam3": "sam3/sam3",
    "sam3.backbones": "sam3/sam3/backbones",
    "sam3.engine": "sam3/sam3/engine",
    "sam3.model": "sam3/sam3/model",
    "sam3.sam": "sam3/sam3/sam",
    "benchmarks": "benchmarks",
    "distillation": "distillation",
    "distillation.models": "distillation/models",
    "distillation.prompt": "distillation/prompt",
    "distillation.supervised": "distillation/supervised",
    "distillation.teachers": "distillation/teachers",
    "stage1": "stage1",
    "stage1.data": "stage1/data",
    "stage1_geometry_finetune": "stage1_geometry_finetune",
    "stage2": "stage2",
    "stage2.data": "stage2/data",
    "stage2.supervised": "stage2/supervised",
}

REQUIRES = [
    "torch>=2.6",
    "torchvision>=0.21",
    "timm>=1.0.17",
    "open_clip_torch>=2.24",
    "yacs>=0.1.8",
    "json5>=0.9.14",
    "numpy>=1.26",
    "safetensors>=0.7",
    "huggingface_hub>=0.34",
    "Pillow>=10.1",
    "tqdm>=4.66",
]
STAGE1 = ["tensorboard>=2.14", "pycocotools>=2.0.7", "scipy>=1.11", "isal>=1.5"]
STAGE2 = [*STAGE1, "opencv-python>=4.8"]
HF = ["transformers>=5.0"]
DEV = [*STAGE2, *HF, "pytest>=8", "pytest-xdist>=3.5", "ruff>=0.6", "scikit-image>=0.22", "scikit-learn>=1.3"]

setup(
    name="efficientsam3",
    version="0.1.0",
    description="Distils SAM3 into light students, stage by stage",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    install_requires=REQUIRES,
    extras_require={"stage1": STAGE1, "stage2": STAGE2, "hf": HF, "dev": DEV},
)
