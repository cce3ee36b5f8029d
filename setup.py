"""Ships conf/, recipes/addition/ and benchmarks/ inside the wheel, as rlswitch/conf and so on."""

from setuptools import find_packages, setup

BESIDE = {
    "rlswitch.conf": "conf",
    "rlswitch.recipes.addition": "recipes/addition",
    "rlswitch.benchmarks": "benchmarks",
}

setup(
    packages=[*find_packages(include=["rlswitch", "rlswitch.*"]), *BESIDE],
    package_dir=BESIDE,
)
