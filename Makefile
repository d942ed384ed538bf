# CUDA compiler from PyPI into .venv-cuda, for machines without a CUDA toolkit.
.PHONY: cuda-toolkit
cuda-toolkit:
	tools/cuda-toolkit
