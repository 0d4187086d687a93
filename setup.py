"""Packages of the distribution: `models` as `dat`, including `configs`; the rest is in pyproject.toml."""

from setuptools import find_namespace_packages, setup

FOLDERS = {"dat": "models", "dat.configs": "configs"}

setup(
    package_dir=FOLDERS,
    packages=[
        *FOLDERS,
        *(
            f"{package}.{inner}"
            for package, folder in FOLDERS.items()
            for inner in find_namespace_packages(folder, exclude=["*__pycache__"])
        ),
    ],
    package_data={"": ["py.typed", "*.yaml"]},
)
