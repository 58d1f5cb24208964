"""One MoE block's parameters, from the hub's layouts and back: see `load_moe`."""

from .model.checkpoint import (
    LAYOUTS as LAYOUTS,
)
from .model.checkpoint import (
    Layout as Layout,
)
from .model.checkpoint import (
    MoEParams as MoEParams,
)
from .model.checkpoint import (
    Tensor as Tensor,
)
from .model.checkpoint import (
    load_moe as load_moe,
)
from .model.checkpoint import (
    to_layout as to_layout,
)
