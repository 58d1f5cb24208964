"""Meshes of one axis, which the tests of several files share."""

import jax
from jax.sharding import AxisType


def mesh_of(devices, kind=AxisType.Auto):
    """The first `devices` devices along one axis "d"."""
    return jax.make_mesh((devices,), ("d",), axis_types=(kind,))
