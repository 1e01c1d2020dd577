"""A LoRA/QLoRA trainer for Llama models: read `loop.py` first, then `model.py`, `adapter.py` and `quant.py`."""
