"""LLM pretraining with the ideas of 科学空间 (kexue.fm) at scale, on DeepSpeed."""

__version__ = "0.1.0"
