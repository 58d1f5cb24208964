"""Pictures of routings and tables."""

from .observe.viz import (
    COLOURS as COLOURS,
)
from .observe.viz import (
    aligned_table as aligned_table,
)
from .observe.viz import (
    benchmark as benchmark,
)
from .observe.viz import (
    expert_load as expert_load,
)
from .observe.viz import (
    load_heatmap as load_heatmap,
)
from .observe.viz import (
    token_map as token_map,
)
