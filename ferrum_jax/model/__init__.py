"""What a model uses: the layer, its module, its parameters, its devices."""
