"""Events as JSON lines, in a file that the environment names."""

from .observe.profile import (
    event as event,
)
from .observe.profile import (
    stages as stages,
)
