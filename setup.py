"""What a wheel holds: the package, the three scripts, and models/lite inside the package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["musetalk", "musetalk.*"]), "musetalk.models.lite"],
    py_modules=[
        "enhanced_musetalk_preprocessing",
        "integrated_musetalk_service",
        "ultra_fast_realtime_inference",
    ],
    package_dir={"musetalk.models.lite": "models/lite"},
    package_data={
        "musetalk.models.lite": ["*.onnx", "*.npy", "portraits/*.jpg", "speech/*.flac"],
        "": ["page/*"],
    },
)
