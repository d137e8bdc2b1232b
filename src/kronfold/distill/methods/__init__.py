"""Distillation methods: one file each, from its own paper, one line here."""

from kronfold.base.registry import Registry
from kronfold.distill.method import Method

METHODS: Registry[type[Method]] = Registry("distillation method")
METHODS.register("kd", "kronfold.distill.methods.kd:KD")
METHODS.register("intermediate", "kronfold.distill.methods.intermediate:Intermediate")
METHODS.register("pkd", "kronfold.distill.methods.pkd:PKD")
METHODS.register("minilm", "kronfold.distill.methods.minilm:MiniLM")
METHODS.register("rail", "kronfold.distill.methods.rail:RAIL")
METHODS.register("alp", "kronfold.distill.methods.alp:ALP")
METHODS.register("annealing", "kronfold.distill.methods.annealing:Annealing")
METHODS.register("mate", "kronfold.distill.methods.mate:MATE")
METHODS.register("ctcd", "kronfold.distill.methods.ctcd:CTCD")

__all__ = ["METHODS"]
