"""The routing of model families, each with its source: see `Preset`."""

from .model.presets import (
    PRESETS as PRESETS,
)
from .model.presets import (
    Preset as Preset,
)
from .model.presets import (
    Source as Source,
)
from .model.presets import (
    deepseek_v3 as deepseek_v3,
)
from .model.presets import (
    glm4_moe as glm4_moe,
)
from .model.presets import (
    gpt_oss as gpt_oss,
)
from .model.presets import (
    kimi_k2 as kimi_k2,
)
from .model.presets import (
    llama4 as llama4,
)
from .model.presets import (
    minimax_m2 as minimax_m2,
)
from .model.presets import (
    mixtral as mixtral,
)
from .model.presets import (
    olmoe as olmoe,
)
from .model.presets import (
    qwen3_moe as qwen3_moe,
)
from .model.presets import (
    qwen3_next as qwen3_next,
)
