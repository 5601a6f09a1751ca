# The names of transformers that qsvd's annotations use. pyright reads every model for the real file: a minute.
from typing import Any

from .configuration_utils import PreTrainedConfig as PreTrainedConfig
from .generation.configuration_utils import GenerationConfig as GenerationConfig
from .generation.logits_process import LogitsProcessor as LogitsProcessor
from .generation.streamers import TextStreamer as TextStreamer
from .modeling_utils import PreTrainedModel as PreTrainedModel
from .processing_utils import ProcessorMixin as ProcessorMixin
from .tokenization_utils_base import PreTrainedTokenizerBase as PreTrainedTokenizerBase
from .trainer import Trainer as Trainer
from .trainer_callback import TrainerCallback as TrainerCallback
from .trainer_callback import TrainerControl as TrainerControl
from .trainer_callback import TrainerState as TrainerState
from .training_args import TrainingArguments as TrainingArguments

__version__: str

def __getattr__(name: str) -> Any: ...
