"""One structure = one place: its spec, tensor functions, solver, layer and what a recipe entry says of it."""
