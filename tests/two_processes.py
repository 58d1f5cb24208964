"""One of two processes of two CPU devices each: `two_processes.py PORT PROCESS FILE` runs the sharded layer.

Once in a shard_map written here, and once divided by its arrays' types.
"""

import functools
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of
from test_parallel import arguments, layer, routings

import ferrum_jax


def main(port, process, path):
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(process))
    assert (jax.device_count(), jax.local_device_count()) == (4, 2)
    mesh = mesh_of(4)
    spread = NamedSharding(mesh, P("d"))
    x, _, *rest = (np.asarray(a) for a in arguments())
    given = x, routings(4)[0], *rest
    args = [jax.make_array_from_callback(a.shape, spread, a.__getitem__) for a in given]
    run = functools.partial(layer, run=ferrum_jax.parallel.moe_mlp, axis_name="d", exchange="padded")
    out = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P("d"), out_specs=P("d")))(*args)
    explicit = mesh_of(4, AxisType.Explicit)
    with jax.set_mesh(explicit):
        args = [jax.make_array_from_callback(a.shape, NamedSharding(explicit, P("d")), a.__getitem__) for a in given]
        by_types = jax.jit(layer)(*args)
    outs = [multihost_utils.process_allgather(a, tiled=True) for a in (out, by_types)]
    if jax.process_index() == 0:
        np.save(path, np.stack(outs))


if __name__ == "__main__":
    main(*sys.argv[1:])
