"""The layer with its experts over a mesh axis: see `moe_mlp`."""

from .model.exchange import (
    EXCHANGES as EXCHANGES,
)
from .model.exchange import (
    ExchangeSizes as ExchangeSizes,
)
from .model.exchange import (
    exchange_sizes as exchange_sizes,
)
from .model.parallel import (
    moe_mlp as moe_mlp,
)
