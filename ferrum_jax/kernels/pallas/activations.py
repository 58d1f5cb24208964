"""The activations that the grouped product computes, made of functions that Mosaic has.

ops/activations.py ACTIVATIONS says what each of them means.
"""

import jax.numpy as jnp


def sigmoid(x):
    return 1 / (1 + jnp.exp(-x))


def silu(gate, up):
    return gate * sigmoid(gate) * up


def gelu_tanh(gate, up):
    # (1 + tanh(x)) / 2 is sigmoid(2 x)
    return gate * sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up


def relu(gate, up):
    return jnp.maximum(gate, 0.0) * up


def relu2(gate, up):
    return jnp.maximum(gate, 0.0) * jnp.maximum(gate, 0.0) * up


def swiglu_oai(gate, up):
    gate, up = jnp.minimum(gate, 7.0), jnp.minimum(jnp.maximum(up, -7.0), 7.0)
    return (up + 1) * gate * sigmoid(1.702 * gate)


ACTIVATIONS = {f.__name__: f for f in (silu, gelu_tanh, relu, relu2, swiglu_oai)}
