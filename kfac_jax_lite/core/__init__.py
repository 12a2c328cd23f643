"""What every room uses: types, views of parameters, trees, meshes, gates, matrices."""
