"""Distillation methods: one file each, from its own paper, one line here."""

from kronfold.base.registry import Registry
from kronfold.distill.method import Method

METHODS: Registry[type[Method]] = Registry("distillation method")
METHODS.register("kd", "kronfold.distill.methods.kd:KD")
METHODS.register("intermediate", "kronfold.distill.methods.intermediate:Intermediate")

__all__ = ["METHODS"]
