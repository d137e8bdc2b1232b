"""One structure, one place: its spec, its tensor functions, its solver, its layer, what a recipe entry says of it, what
it costs. `registry.py` is what the rest of the project sees of all of them; no other room names one."""
