"""Ships conf/ inside the wheel as rlswitch/conf; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["rlswitch", "rlswitch.*"]), "rlswitch.conf"],
    package_dir={"rlswitch.conf": "conf"},
)
