"""What one sees of a routing, and checks it with. The dump asks the tables to tell it of theirs."""

from . import dump as dump
