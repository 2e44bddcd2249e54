"""Two packages in one distribution: arcopo_fast lies beside this file, arcopo_kernels in kernels/. All else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["arcopo_fast", "arcopo_fast.*"]), *find_packages("kernels")],
    package_dir={"arcopo_kernels": "kernels/arcopo_kernels"},
    package_data={"arcopo_fast": ["recipes/*.yaml", "data/*.txt", "reports/*.css", "toy/checkpoint/**/*"]},
)
