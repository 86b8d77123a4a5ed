"""Installs the packages, the DeepSpeed files and the three commands. `bash launch/quickstart.sh` does it for you."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "ccd_train/__init__.py").read_text()).group(1)

setup(
    name="ccd-train",
    version=VERSION,
    description="Self-supervised Character-to-Character Distillation, pretrained on DeepSpeed",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="BSD-2-Clause",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["ccd_train", "ccd_train.*", "data_tools", "data_tools.*", "launch", "ds_configs"]),
    package_data={
        "ccd_train": ["config/recipes/*.yaml", "reports/*.css"],
        "ds_configs": ["*.json"],
        "launch": ["*.sh", "*.sbatch", "constraints.txt"],
    },
    install_requires=[
        "torch>=2.6",
        "deepspeed>=0.18",
        "lmdb>=1.4",
        "webdataset>=1.0",
        "numpy>=2.0",
        "Pillow>=10.1",
        "opencv-python>=4.9",
        "tensorboard>=2.15",
        "PyYAML>=6.0",  # recipes
        "tqdm>=4.66",  # progress bars
        "safetensors>=0.4",  # weights for others, without pickle
        "rapidfuzz>=3.0",  # the edit distance of evaluations
        "psutil>=5.9",  # the interface between the nodes, by its name
    ],
    extras_require={
        "onnx": ["onnx>=1.16", "onnxscript>=0.1", "onnxruntime>=1.18"],  # ccd-train export --format onnx
        "test": [
            *("pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100", "ruff>=0.9", "mypy>=1.13", "coverage>=7.10"),
            *("onnx>=1.16", "onnxscript>=0.1", "onnxruntime>=1.18"),
        ],
    },
    entry_points={
        "console_scripts": [
            "ccd-train = ccd_train.__main__:main",
            "ccd-data = data_tools.__main__:main",
            "ccd-submit = launch.submit:main",
        ]
    },
)
