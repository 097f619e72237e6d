"""What the server of conftest.py holds ready for every run it forks: imports, and a cache that the first use fills."""

import gc

import datasets  # noqa: F401
import math_verify  # noqa: F401
import matplotlib.figure  # noqa: F401
import torch.distributed.checkpoint  # noqa: F401
import torch.distributed.fsdp  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
import transformers.integrations.sdpa_attention  # noqa: F401
import transformers.models.auto.modeling_auto  # noqa: F401
import transformers.models.qwen3.modeling_qwen3  # noqa: F401
import tyro  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("qwen3")
gc.freeze()  # a collection in a fork would touch, and so copy, the pages of all that was imported
