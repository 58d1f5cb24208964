"""The ops, a family a file: public function, meaning in jnp, derivative."""
