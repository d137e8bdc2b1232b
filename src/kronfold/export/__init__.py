"""Getting models in and out: the Hugging Face checkpoint route and the dense merge."""
