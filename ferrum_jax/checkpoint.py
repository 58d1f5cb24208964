"""One MoE block's parameters, from the hub's layouts and back: see `load_moe`."""

from .model.checkpoint import load_moe as load_moe
from .model.checkpoint import to_layout as to_layout
from .model.layouts import LAYOUTS as LAYOUTS
from .model.layouts import Layout as Layout
from .model.layouts import MoEParams as MoEParams
from .model.layouts import Tensor as Tensor
