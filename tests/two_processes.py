"""One of two processes of two CPU devices each: `two_processes.py PORT PROCESS FILE` runs the sharded layer."""

import functools
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
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
    args = [jax.make_array_from_callback(a.shape, spread, a.__getitem__) for a in (x, routings(4)[0], *rest)]
    run = functools.partial(layer, run=ferrum_jax.parallel.moe_mlp, axis_name="d", exchange="padded")
    out = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P("d"), out_specs=P("d")))(*args)
    out = multihost_utils.process_allgather(out, tiled=True)
    if jax.process_index() == 0:
        np.save(path, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
