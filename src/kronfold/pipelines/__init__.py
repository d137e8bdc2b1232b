"""The only room that composes the others: compress, run in stages, pretrain."""
