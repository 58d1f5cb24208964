"""What an op is: how it becomes a JAX primitive, and what it takes and returns."""
