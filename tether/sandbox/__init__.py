"""Confines processes that run models with Linux kernel features: what they may read, write, call and use.

A service describes the confinement (:mod:`tether.sandbox.plan`). The process starts as
:mod:`tether.sandbox.enter`, which confines itself and only then runs the module that imports a framework or a
model's code.
"""
